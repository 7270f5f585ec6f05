"""Every question about a picture, answered at once behind its visual tokens.

Visual tokens enter, as a vision graph returns them; which of the pocket checkpoint's questions are
answered exactly leaves. The language model is the checkpoint's own in PyTorch, float32. All
questions about a picture share one pass in which each is blind to the others, and an answer is
right when every token of it, the end included, is the most likely one behind the right tokens
before it: exactly when greedy decoding would write it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

POCKET = Path(__file__).resolve().parents[1] / "models" / "pocket-llava"
sys.path.insert(0, str(POCKET))

from evaluate import load_checkpoint, read_held_out  # noqa: E402
from packing import IGNORED, PackedText, block_mask, encode_prefix, pack  # noqa: E402

_PICTURES_AT_ONCE = 25


@dataclass(frozen=True)
class Layout:
    """Where the visual tokens of pictures stand, if not one after the other.

    Attributes:
        places: int64[pictures, N]; 0 is the picture's first position.
        length: positions that each picture takes.
        bias: float32[pictures, N]; added to every score of attention to a token.
    """

    places: NDArray[np.int64]
    length: int
    bias: NDArray[np.float32]

    def part(self, pictures: slice) -> Layout:
        """Return that of some of the pictures."""
        return Layout(self.places[pictures], self.length, self.bias[pictures])


class Examination:
    """The held-out questions and the language model that answers them.

    Attributes:
        pictures: files, in the order visual tokens are expected in.
        questions: the questions about each of them.
        picture_of: int64[Q]; which picture each question is about.
        types: the type of each question.
    """

    def __init__(
        self, checkpoint: Path, data: Path, pictures: int | None = None, model: Any = None
    ) -> None:
        """Read the questions and load the model.

        Args:
            checkpoint: a checkpoint of the pocket architecture.
            data: pictures and `questions.jsonl`.
            pictures: ask about the first so many only.
            model: the checkpoint as transformers opens it, where it is no LLaVA-1.5.
        """
        held_out = read_held_out(data)
        self.pictures: list[Path] = held_out.paths[:pictures]
        self.questions = held_out.questions[:pictures]
        counts = [len(asked) for asked in self.questions]
        self.picture_of = np.repeat(np.arange(len(counts)), counts)
        self.types = np.array([one.type for asked in self.questions for one in asked])
        self._model: Any = load_checkpoint(checkpoint)[0] if model is None else model

    def right_answers(
        self,
        tokens: NDArray[np.float32],
        valid: NDArray[np.int64],
        layout: Layout | None = None,
    ) -> NDArray[Any]:
        """Return bool[Q]: which questions are answered exactly.

        Args:
            tokens: float32[pictures, N, D]; visual tokens.
            valid: int64[pictures]; how many of each picture's are real.
            layout: where they stand; left out, one after the other.
        """
        right = []
        for start in range(0, len(tokens), _PICTURES_AT_ONCE):
            part = slice(start, start + _PICTURES_AT_ONCE)
            text, laid = pack(self.questions[part]), layout.part(part) if layout else None
            right.append(self._judge(tokens[part], valid[part], text, laid))
        return np.concatenate(right)

    def right_answers_about(
        self, picture: int, tokens: NDArray[np.float32], valid: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Return the same of one picture's questions; float32[1, N, D] and int64[1]."""
        return self._judge(tokens, valid, pack([self.questions[picture]]))

    @torch.no_grad()
    def _judge(
        self,
        tokens: NDArray[np.float32],
        real: NDArray[np.int64],
        text: PackedText,
        layout: Layout | None = None,
    ) -> NDArray[Any]:
        visual, valid = torch.from_numpy(tokens), torch.from_numpy(real)
        llm = self._model.model.language_model
        embed = llm.get_input_embeddings()
        prefix = torch.tensor(encode_prefix(False))
        batch, before = len(visual), len(prefix) + visual.shape[1]
        inputs = torch.cat([embed(prefix).expand(batch, -1, -1), visual, embed(text.ids)], 1)
        # Padding is seen by nobody and takes no position.
        ends = len(prefix) + valid[:, None]
        positions = torch.cat(
            [torch.arange(before).expand(batch, -1), ends + text.positions.clamp(min=0)], 1
        )
        mask = block_mask(text.blocks, before)  # [B, 1, S, S]
        places = torch.arange(mask.shape[-1])
        padding = (places >= ends) & (places < before)  # [B, S]
        mask = mask.masked_fill(padding[:, None, None, :], -1e4)
        if layout is not None:
            positions[:, len(prefix) : before] = len(prefix) + torch.from_numpy(layout.places)
            positions[:, before:] = len(prefix) + layout.length + text.positions.clamp(min=0)
            mask[..., len(prefix) : before] += torch.from_numpy(layout.bias)[:, None, None]
        hidden = llm(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state[:, before:]
        wanted = text.targets != IGNORED
        logits = self._model.lm_head(hidden[wanted])  # [A, V]
        missed = torch.zeros(len(text.asked), dtype=torch.int64)
        wrong = (logits.argmax(-1) != text.targets[wanted]).long()
        missed.index_add_(0, text.questions[wanted], wrong)
        return (missed == 0).numpy()
