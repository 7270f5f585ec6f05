"""Export a vision graph in three parts, for budgets that share the tower and the projector.

The parts are traced by themselves: the tower with what the reducers read, each budget's reducer,
which has no weights, and the projector, which takes any number of tokens. Run one after the other
they compute what the whole graph computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor, nn

from engines.errors import OptionError
from engines.manifest import ORDER_OUTPUT, TOKENS_AXIS
from export.checkpoint.llava import Checkpoint
from export.reducers import Reducer
from export.towers import Scoring, TowerOutput
from export.vision.to_onnx import note_reducer, trace_module
from export.vision.vision_module import INPUT, OUTPUTS, VisionModule, build_vision_module

FEATURES, SCORES, KEYS = "features", "scores", "keys"
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
        self._shapes = {
            name: tuple(value.shape[1:])
            for name, value in zip(
                (FEATURES, SCORES, KEYS), (seen.features, seen.scores, seen.keys), strict=True
            )
        }

    def trace_tower(self) -> ir.Model:
        """Return pixels -> features and, where a reducer reads them, scores and keys."""
        side = self._whole.image_size
        outputs = (FEATURES, SCORES, KEYS) if self._scored else (FEATURES,)
        return trace_module(_Tower(self._whole, len(outputs)), {INPUT: (3, side, side)}, outputs)

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
        shapes = self._shapes if scored else {FEATURES: self._shapes[FEATURES]}
        model = trace_module(_Reducer(whole), shapes, outputs)
        for value in [one for one in model.graph.inputs if not one.uses()]:
            model.graph.inputs.remove(value)  # what the reducer does not read is not handed on
        note_reducer(model, reducer, whole.token_count)
        return model

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


class _Tower(nn.Module):
    def __init__(self, whole: VisionModule, outputs: int) -> None:
        super().__init__()
        self.tower = whole.tower
        self._outputs = outputs

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        seen = self.tower(pixel_values)
        return (seen.features, seen.scores, seen.keys)[: self._outputs]


class _Reducer(nn.Module):
    def __init__(self, whole: VisionModule) -> None:
        super().__init__()
        self.reducer = whole.reducer

    def forward(
        self, features: Tensor, scores: Tensor | None = None, keys: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if scores is None or keys is None:  # as towers leave them where nothing is to be scored
            scores, keys = features[:, :0, 0], features[:, :, :0]
        left = self.reducer(TowerOutput(features, scores, keys))
        outputs = (left.tokens, left.valid, left.origin, left.assignment)
        return outputs if left.order is None else (*outputs, left.order)


class _Projector(nn.Module):
    def __init__(self, whole: VisionModule) -> None:
        super().__init__()
        self.projector = whole.projector

    def forward(self, reduced_tokens: Tensor) -> Tensor:
        visual: Tensor = self.projector(reduced_tokens)
        return visual
