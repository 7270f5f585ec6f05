"""Export a vision graph in three parts, for budgets that share the tower and the projector.

The parts are traced by themselves: the tower with what the reducers read, each budget's reducer,
which has no weights, and the projector, which takes any number of tokens. Run one after the other
they compute what the whole graph computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import Tensor, nn

from engines.errors import OptionError
from engines.manifest import ORDER_OUTPUT, TOKENS_AXIS
from export.checkpoint.llava import Checkpoint
from export.reducers import Reducer
from export.towers import Scoring, TowerOutput, without_scores
from export.vision.to_onnx import note_reducer, trace_module
from export.vision.vision_module import INPUT, OUTPUTS, VisionModule, build_vision_module

FEATURES, CLASS_TOKEN, SCORES, KEYS = "features", "class_token", "scores", "keys"
REDUCED = "reduced_tokens"
"""What a reducer hands on to the projector."""


class VisionParts:
    """The parts of the graphs of several reducers, in float32.

    Args:
        whole: the graph of the reducer that wants most of the tower.
    """

    def __init__(self, whole: VisionModule) -> None:
        self._whole = whole
        self._scored = whole.reducer.reduce.scoring is not Scoring.NONE
        side = self._whole.image_size
        with torch.no_grad():
            seen = self._whole.tower(torch.zeros(1, 3, side, side))
        self._shapes = {name: tuple(value.shape[1:]) for name, value in _named(seen).items()}

    def trace_tower(self) -> ir.Model:
        """Return pixels -> features and, where a reducer reads them, scores and keys."""
        side = self._whole.image_size
        outputs = tuple(self._handed_on(self._scored))
        return trace_module(_Tower(self._whole, outputs), {INPUT: (3, side, side)}, outputs)

    def trace_reducer(self, reducer: Reducer) -> ir.Model:
        """Return what the reducer reads of the tower -> `REDUCED` and what became of each patch."""
        whole = VisionModule(
            nn.Identity(),
            reducer,
            nn.Identity(),
            image_size=self._whole.image_size,
            patches=self._whole.patches,
        )
        outputs = (REDUCED, *OUTPUTS[1:], *((ORDER_OUTPUT,) if reducer.ranks else ()))
        scored = self._scored and reducer.scoring is not Scoring.NONE
        shapes = self._handed_on(scored)
        model = trace_module(_Reducer(whole, tuple(shapes)), shapes, outputs)
        _ask_for_batch(model.graph.inputs[0], model.graph)
        for value in [one for one in model.graph.inputs if not one.uses()]:
            model.graph.inputs.remove(value)  # what the reducer does not read is not handed on
        note_reducer(model, reducer, whole.token_count)
        return model

    def _handed_on(self, scored: bool) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of what a tower computes, with or without scores."""
        left_out = set() if scored else {SCORES, KEYS}
        return {name: shape for name, shape in self._shapes.items() if name not in left_out}

    def trace_projector(self) -> ir.Model:
        """Return `REDUCED`, any number of them -> visual tokens."""
        width = self._shapes[FEATURES][-1]
        part = _Projector(self._whole)
        return trace_module(part, {REDUCED: (TOKENS_AXIS, width)}, OUTPUTS[:1])


def build_parts(checkpoint: Checkpoint, reducers: Sequence[Reducer]) -> VisionParts:
    """Put a checkpoint's tower and projector around several reducers.

    Raises:
        CheckpointError, OptionError: as `build_vision_module`; or the reducers do not want the
            same scores, and one tower computes one kind.
    """
    wanted = {reducer.scoring for reducer in reducers} - {Scoring.NONE}
    if len(wanted) > 1:
        told = ", ".join(f"{one.name} ({one.scoring.value})" for one in reducers)
        raise OptionError(
            f"The reducers {told} want scores of different layers, and one tower computes one "
            "kind. Build a bundle for each."
        )
    first = next((one for one in reducers if one.scoring in wanted), reducers[0])
    return VisionParts(build_vision_module(checkpoint, first))


def _ask_for_batch(features: ir.Value, graph: ir.Graph) -> None:
    """Take the number of pictures from the features, which every reducer reads.

    The exporter takes it from any input, and an input that is read for nothing else would have to
    be handed on.
    """
    for value in graph.inputs:
        for node, at in list(value.uses()):
            asked = (
                node.op_type,
                node.attributes.get_int("start", 0),
                node.attributes.get_int("end", 0),
            )
            if asked == ("Shape", 0, 1):
                node.replace_input_with(at, features)


def _named(seen: TowerOutput) -> dict[str, Tensor]:
    """Return what a tower computed by the names it is handed on under."""
    first = {} if seen.class_token is None else {CLASS_TOKEN: seen.class_token}
    return {FEATURES: seen.features, **first, SCORES: seen.scores, KEYS: seen.keys}


class _Tower(nn.Module):
    def __init__(self, whole: VisionModule, outputs: Sequence[str]) -> None:
        super().__init__()
        self.tower = whole.tower
        self._outputs = outputs

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        seen = _named(self.tower(pixel_values))
        return tuple(seen[name] for name in self._outputs)


class _Reducer(nn.Module):
    def __init__(self, whole: VisionModule, inputs: Sequence[str]) -> None:
        super().__init__()
        self.reducer = whole.reducer
        self._inputs = inputs

    def forward(
        self,
        first: Tensor,
        second: Tensor | None = None,
        third: Tensor | None = None,
        fourth: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        given = dict(zip(self._inputs, (first, second, third, fourth), strict=False))
        seen = without_scores(first, given.get(CLASS_TOKEN))
        scores, keys = given.get(SCORES), given.get(KEYS)
        if scores is not None and keys is not None:
            seen = replace(seen, scores=scores, keys=keys)
        left = self.reducer(seen)
        outputs = (left.tokens, left.valid, left.origin, left.assignment)
        return outputs if left.order is None else (*outputs, left.order)


class _Projector(nn.Module):
    def __init__(self, whole: VisionModule) -> None:
        super().__init__()
        self.projector = whole.projector

    def forward(self, reduced_tokens: Tensor) -> Tensor:
        visual: Tensor = self.projector(reduced_tokens)
        return visual
