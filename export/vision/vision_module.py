"""Tower, reducer and projector as one PyTorch module, from pixels to visual tokens.

The projector comes after the reducer, so it computes only the tokens that are left.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import Tensor, nn

from engines.errors import OptionError
from engines.manifest import ORDER_OUTPUT, WORTH_OUTPUT
from export.checkpoint.llava import Checkpoint
from export.reducers import Reduced, Reducer
from export.towers import TowerOutput
from export.towers.registry import make_tower

INPUT = "pixel_values"
OUTPUTS = ("visual_tokens", "valid_count", "patch_index", "assignment")


class VisionModule(nn.Module):
    """Pixels in, visual tokens out.

    Args:
        tower: gives a `TowerOutput` with what the reducer wants.
        reducer: from `export.reducers.make_reducer`.
        projector: tower features -> language model embeddings.
        image_size: side of the square picture in pixels.
        patches: how many patches the tower makes of it.
        tells_worth: say what each token is worth, too. The reducer weighs.

    Raises:
        OptionError: the reducer's budget does not fit that many patches.
    """

    def __init__(
        self,
        tower: nn.Module,
        reducer: Reducer,
        projector: nn.Module,
        image_size: int,
        patches: int,
        tells_worth: bool = False,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.reducer = ReducerModule(reducer)
        self.projector = projector
        self.image_size = image_size
        self.patches = patches
        self.token_count = reducer.token_count(patches)
        self.tells_worth = tells_worth
        self.outputs = (
            *OUTPUTS,
            *((ORDER_OUTPUT,) if reducer.ranks else ()),
            *((WORTH_OUTPUT,) if tells_worth else ()),
        )

    @property
    def patch_side(self) -> int:
        """Patches along one side of the picture."""
        return isqrt(self.patches)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Encode a batch of pictures.

        Args:
            pixel_values: float32[B, 3, H, W].

        Returns:
            visual_tokens: float32[B, N, D_llm]; rows beyond the valid count are not to be read.
            valid_count: int64[B].
            patch_index: int64[B, N]; `Reduced.origin`.
            assignment: int64[B, P]; `Reduced.assignment`.
            token_order: int64[B, N]; `Reduced.order`, where the reducer ranks.
            token_worth: float32[B, N]; `Reduced.worth`, where the graph tells it.
        """
        reduced = self.reducer(self.tower(pixel_values))
        visual = self.projector(reduced.tokens)  # [B, N, D_llm]
        more = (reduced.order, reduced.worth if self.tells_worth else None)
        outputs = (visual, reduced.valid, reduced.origin, reduced.assignment, *more)
        return tuple(one for one in outputs if one is not None)


class ReducerModule(nn.Module):
    """A reducer as a module, so that its nodes in the graph can be told from the others."""

    def __init__(self, reducer: Reducer) -> None:
        super().__init__()
        self.reduce = reducer

    def forward(self, tower: TowerOutput) -> Reduced:
        """Reduce a batch."""
        return self.reduce(tower)


def build_vision_module(
    checkpoint: Checkpoint, reducer: Reducer, tells_worth: bool = False
) -> VisionModule:
    """Put a checkpoint's tower and projector around a reducer, in float32.

    Args:
        checkpoint: opened.
        reducer: from `export.reducers.make_reducer`.
        tells_worth: see `VisionModule`.

    Raises:
        CheckpointError: a tensor of the tower or the projector is missing or misshapen.
        OptionError: the reducer's budget does not fit the tower, or `none` would hand on other
            tokens than the language model was trained with.
    """
    _check_class_token(checkpoint, reducer)
    model: Any = checkpoint.vision_model()
    tower = make_tower(model, checkpoint.feature_layers, reducer.scoring)
    graph = VisionModule(
        tower,
        reducer,
        checkpoint.projector(),
        image_size=checkpoint.image_size,
        patches=checkpoint.patch_side**2,
        tells_worth=tells_worth,
    )
    return graph.eval().requires_grad_(False)


def _check_class_token(checkpoint: Checkpoint, reducer: Reducer) -> None:
    given = reducer.options.get("class_token")
    if reducer.name == "none" and given != checkpoint.keeps_class_token:
        raise OptionError(
            f"reducer none: class_token is {given}, but vision_feature_select_strategy of the "
            f"checkpoint is {checkpoint.select_strategy!r}. "
            f"Make the reducer with class_token={checkpoint.keeps_class_token}."
        )
