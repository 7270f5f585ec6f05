"""Compute what transformers makes of a checkpoint: visual tokens, logits and greedy answers.

The tower is transformers' own with eager attention that returns every attention matrix, as in the
papers' code. It shares nothing with `export.towers`, so a mistake there shows.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibration.agreement.stages import EMBEDDINGS, KEYS, MERGING, SCORES, layer_stage
from engines.free_memory import read_free_memory
from export.checkpoint.llava import Checkpoint
from export.checkpoint.weights import Part as CheckpointPart
from export.language.streamed_model import stream_language_model
from export.reducers import Reducer
from export.towers import Scoring, TowerOutput, without_scores
from export.towers.registry import has_class_token
from runtime.language.parts import Part
from runtime.vision import VisualTokens

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observation:
    """What PyTorch computes for one batch, inner values included.

    Attributes:
        tokens: what the bundle's vision graph should return.
        stages: values of the first picture by stage, in the order they are computed.
    """

    tokens: VisualTokens
    stages: dict[str, NDArray[np.float32]]


class VisionReference:
    """Tower by transformers, reducer and projector in PyTorch, all in float32.

    Raises:
        CheckpointError: a tensor of the tower or the projector is missing or misshapen.
    """

    def __init__(self, checkpoint: Checkpoint, reducer: Reducer) -> None:
        self.reducer = reducer
        self.feature_layers = checkpoint.feature_layers
        self.model: Any = checkpoint.vision_model()
        self.model.set_attn_implementation("eager")
        self.projector = checkpoint.projector()

    @torch.no_grad()
    def observe(self, pixel_values: NDArray[np.float32]) -> Observation:
        """Encode preprocessed pictures.

        Args:
            pixel_values: float32[B, 3, H, W].
        """
        started = time.perf_counter()
        pixels = torch.from_numpy(pixel_values)
        tower, states = observe_tower(self.model, self.feature_layers, self.reducer.scoring, pixels)
        reduced = self.reducer(tower)
        tokens: Tensor = self.projector(reduced.tokens)
        seen = VisualTokens(
            tokens=tokens.numpy(),
            valid=reduced.valid.numpy(),
            origin=reduced.origin.numpy(),
            assignment=reduced.assignment.numpy(),
            milliseconds={"encode": (time.perf_counter() - started) * 1e3},
        )
        stages = {EMBEDDINGS: states[0]}
        stages |= {layer_stage(layer): state for layer, state in enumerate(states[1:])}
        if self.reducer.scoring is not Scoring.NONE:
            stages |= {SCORES: tower.scores, KEYS: tower.keys}
        stages[MERGING] = reduced.tokens
        return Observation(seen, {name: value[0].numpy() for name, value in stages.items()})

    def encode(self, pixel_values: NDArray[np.float32]) -> VisualTokens:
        """Encode preprocessed pictures; see `observe`."""
        return self.observe(pixel_values).tokens


def observe_tower(
    model: Any, feature_layers: Sequence[int], scoring: Scoring, pixel_values: Tensor
) -> tuple[TowerOutput, tuple[Tensor, ...]]:
    """Run transformers' tower and read off what a reducer wants, as the papers' code does.

    Args:
        model: `CLIPVisionModel` or its kin, with eager attention.
        feature_layers: how many encoder layers run before features are taken; the scores are of the
            deepest.
        scoring: whose attention row and keys to read.
        pixel_values: float32[B, 3, H, W].

    Returns:
        What a reducer wants; and the embeddings and what each layer put out, float32[B, S, D] each.
    """
    layers = getattr(model, "vision_model", model).encoder.layers
    deepest = max(feature_layers)
    scored = layers[-1 if scoring is Scoring.LAST_LAYER else deepest - 1].self_attn
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    handles = [
        getattr(scored, name).register_forward_hook(keep(name)) for name in ("q_proj", "k_proj")
    ]
    try:
        outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    states: tuple[Tensor, ...] = outputs.hidden_states
    first = int(has_class_token(model.config))
    read = torch.cat([states[layer] for layer in feature_layers], dim=-1)  # [B, S, D x layers]
    features = read[:, first:]
    class_token = read[:, :1] if first else None
    if scoring is Scoring.NONE:
        return without_scores(features, class_token), states
    keys = seen["k_proj"]  # [B, S, D]
    if scoring is Scoring.SELECTED_LAYER:
        attention = outputs.attentions[deepest - 1]  # [B, H, S, S]
        heads = attention.shape[1]
        attention = attention.sum(dim=1)  # [B, S, S]
        keys = keys.view(*keys.shape[:2], heads, -1).mean(dim=2)  # [B, S, d]
    else:
        logits = seen["q_proj"] @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5
        attention = logits.softmax(dim=-1)  # [B, S, S]
    scores = attention[:, 0, 1:] if first else attention.mean(dim=1)  # [B, P]
    return TowerOutput(features, scores, keys[:, first:], class_token), states


class LanguageReference:
    """The checkpoint's language model in PyTorch, in float32.

    Where that would take more than half of the memory there is, beside the bundle that it is
    compared with, its layers are read from the checkpoint as they run: slower, the same numbers.

    Raises:
        CheckpointError: a tensor of the language model is missing or misshapen.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        shapes = checkpoint.weights.shapes(CheckpointPart.LANGUAGE_MODEL).values()
        needed_bytes = 4 * sum(map(math.prod, shapes))
        room = read_free_memory()
        if room is not None and needed_bytes > room / 2:
            _log.warning(
                "The language model in float32 takes %.1f GB and %.1f GB are available: PyTorch "
                "reads it layer by layer, once for each token.",
                needed_bytes / 1e9,
                room / 1e9,
            )
            self.model: Any = stream_language_model(checkpoint)
        else:
            self.model = checkpoint.language_model(torch.float32)

    @torch.no_grad()
    def answer(
        self, parts: Sequence[Part], max_tokens: int, stop_token_ids: Sequence[int]
    ) -> tuple[NDArray[np.float32], list[int]]:
        """Answer greedily.

        Args:
            parts: the prompt, as a language backend takes it.
            max_tokens: most tokens of the answer.
            stop_token_ids: ids that end it.

        Returns:
            Logits of the first token, float32[V], and the answer's ids without the one that ended
            it.
        """
        rows = torch.cat([self._rows(part) for part in parts])[None]  # [1, N, D]
        written = self.model.generate(
            inputs_embeds=rows,
            attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=list(stop_token_ids),
            pad_token_id=stop_token_ids[0] if stop_token_ids else 0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids: list[int] = written.sequences[0].tolist()
        if ids and ids[-1] in stop_token_ids:
            ids.pop()
        return written.logits[0][0].float().numpy(), ids

    def _rows(self, part: Part) -> Tensor:
        given = torch.from_numpy(np.ascontiguousarray(part))
        if given.dtype == torch.int64:
            rows: Tensor = self.model.get_input_embeddings()(given)
            return rows
        return given.float()
