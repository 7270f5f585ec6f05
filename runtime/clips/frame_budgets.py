"""What a frame of a clip may cost in visual tokens, and which graph gives so many.

Where each frame is a picture of its own in the prompt, it costs one of the bundle's budgets. Where
the whole clip has one place (LLaVA-OneVision), it depends on the graph:

- all tokens: each frame costs its pooled tokens, as in training, or nothing.
- a reducer that ranks: any number up to the largest budget, by the first tokens of its ranking.
- another reducer: one of its budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engines.bundle import Bundle
from engines.manifest import ORDER_OUTPUT, VisionGraph
from engines.picture_tiles import ALL_TOKENS
from runtime.vision import Pixels, VisualTokens
from runtime.vision.graph_pool import GraphPool
from runtime.vision.visual_tokens import Shown


@dataclass(frozen=True)
class FrameBudgets:
    """What frames may cost.

    Attributes:
        steps: visual tokens of a frame, smallest first.
        shown: how frames are shown.
        graph: the budget of the graph that gives every step; None: each step has its own.
        pooled: whether every frame has all its tokens, pooled.
    """

    steps: Sequence[int]
    shown: Shown = "alone"
    graph: int | None = None
    pooled: bool = False

    def encode(
        self, pool: GraphPool, images: Sequence[Pixels], tokens: Sequence[int]
    ) -> list[VisualTokens]:
        """Encode frames, those of one graph together; those with no tokens are left out.

        Args:
            pool: the bundle's graphs.
            images: the frames, uint8[H, W, 3].
            tokens: of each, one of `steps` or 0.

        Raises:
            EngineError: a graph cannot be loaded, or failed.
        """
        encoded: dict[int, VisualTokens] = {}
        for budget in sorted({self.graph or given for given in tokens if given}):
            places = [
                at for at, given in enumerate(tokens) if given and budget == (self.graph or given)
            ]
            for batch in self._batches(pool.bundle, places):
                seen = pool.encoder(budget).encode([images[at] for at in batch], self.shown)
                encoded |= dict(zip(batch, seen.split(), strict=True))
        return [self._first(encoded[at], tokens[at]) for at in sorted(encoded)]

    def _batches(self, bundle: Bundle, places: list[int]) -> list[list[int]]:
        """Return what goes into one run of a graph: no more than the squares of a picture."""
        most = bundle.most_squares if self.shown == "frame" else len(places)
        return [places[start : start + most] for start in range(0, len(places), most)]

    def _first(self, seen: VisualTokens, count: int) -> VisualTokens:
        """Return a frame with the tokens it was given."""
        if self.graph is None or self.pooled:
            return seen
        return replace(seen.first(count), square_budget=self.graph)


def frame_budgets_of(pool: GraphPool, graph: VisionGraph) -> FrameBudgets:
    """Return what the frames of a clip may cost.

    Args:
        pool: the bundle's graphs.
        graph: the one that is asked with; if it leaves all tokens, every frame has all of them.
    """
    bundle = pool.bundle
    if bundle.clips is None:
        return FrameBudgets(pool.budgets)
    if graph.reducer.name == ALL_TOKENS:
        steps = (frame_tokens(bundle, graph),)
        return FrameBudgets(steps, "frame", graph.reducer.tokens, pooled=True)
    reducing = [one for one in pool.budgets if bundle.vision(one).reducer.name != ALL_TOKENS]
    if ORDER_OUTPUT in {spec.name for spec in bundle.vision(reducing[-1]).outputs}:
        return FrameBudgets(range(1, reducing[-1] + 1), "frame", reducing[-1])
    return FrameBudgets(reducing, "frame")


def frame_tokens(bundle: Bundle, graph: VisionGraph) -> int:
    """Return how many visual tokens a frame has where none are left out."""
    grid = graph.patch_rows, graph.patch_columns
    rows, columns = grid if bundle.clips is None else bundle.clips.pooled(*grid)
    return rows * columns


def usual_total(bundle: Bundle, graph: VisionGraph, frames: int) -> int:
    """Return what a clip may cost where nobody says it.

    It is what one picture has patches; or, where the clip has one place in the prompt, what all its
    frames cost in training, pooled.
    """
    return frame_tokens(bundle, graph) * (1 if bundle.clips is None else frames)
