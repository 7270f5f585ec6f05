"""What the vision tower saw in a picture, and how a client is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.errors import EngineError
from runtime.vision import VisualTokens
from runtime.vision.layouts import View, views_of


@dataclass(frozen=True)
class SeenPicture:
    """A picture as the language model is shown it.

    Attributes:
        visual: its tokens, a batch of one.
        width: of the picture, in pixels.
        height: of it.
        milliseconds: what its stages took; 0 where it was remembered.
    """

    visual: VisualTokens
    width: int
    height: int
    milliseconds: dict[str, float]

    @property
    def count(self) -> int:
        """How many visual tokens it has, padding left out."""
        return int(self.visual.valid[0])

    @property
    def memory_bytes(self) -> int:
        """The memory that it takes."""
        visual = self.visual
        return visual.tokens.nbytes + visual.origin.nbytes + visual.assignment.nbytes

    def document(self, bundle: Bundle) -> dict[str, Any]:
        """Return which patches were kept, as JSON.

        `kept` are rows and columns of the patches that became a token each, `assignment` is what
        became of every patch, row by row (see `VisualTokens`), and `box` is where the grid of
        patches lies in the picture: top, left, bottom and right in pixels. Of a picture that was
        cut into tiles this is told of all tiles as one grid, and in `views` of the view of the
        whole picture and of the tiles.
        """
        graph = bundle.vision(self.visual.budget)
        size = (self.height, self.width)
        views = [self._told(view) for view in views_of(bundle, graph, size, self.visual.shown)]
        return {
            "visual_tokens": self.count,
            "budget": graph.reducer.tokens,
            "reducer": graph.reducer.name,
            "width": self.width,
            "height": self.height,
            **views[-1],
            **({"views": views} if len(views) > 1 else {}),
            "milliseconds": {name: round(ms, 3) for name, ms in self.milliseconds.items()},
        }

    def _told(self, view: View) -> dict[str, Any]:
        """Return what became of the patches of a view, as JSON."""
        rows, columns = view.patches.shape
        kept = self.visual.origin[0, : self.count]
        _, found = np.nonzero(kept[:, None] == view.patches.ravel())  # as the tokens come
        edges = (view.rows[0], view.columns[0], view.rows[-1], view.columns[-1])
        return {
            "patch_rows": rows,
            "patch_columns": columns,
            "kept": [[int(at) // columns, int(at) % columns] for at in found],
            "assignment": self.visual.assignment[0, view.patches.ravel()].tolist(),
            "box": [round(float(edge), 2) for edge in edges],
        }

    def safetensors(self, bundle: Bundle) -> bytes:
        """Return the tokens as a safetensors file.

        It holds ``visual_tokens`` float16[N, D], ``patch_index`` int64[N] and ``assignment``
        int64[P]; the header says which model they are for. Of a picture that was cut into tiles,
        patches count on from square to square, the whole view's first; a newline is of none.

        Raises:
            EngineError: a token that float16 cannot hold.
        """
        from safetensors.numpy import save

        with np.errstate(over="ignore"):
            half = self.visual.tokens_of(0).astype(np.float16)  # [N, D]
        if not np.isfinite(half).all():
            raise EngineError(
                "The visual tokens hold numbers beyond 65504, float16's largest, and were not "
                "sent: they would spoil what reads them. Build the vision graph with --precision "
                "fp32, or calibrate on frames like this one."
            )
        graph = bundle.vision(self.visual.budget)
        about = {
            "model": bundle.manifest.model,
            "embeddings": bundle.manifest.files[bundle.manifest.text.embeddings].sha256,
            "reducer": graph.reducer.name,
            "patch_rows": graph.patch_rows,
            "patch_columns": graph.patch_columns,
            "width": self.width,
            "height": self.height,
        }
        arrays: dict[str, NDArray[Any]] = {
            "visual_tokens": half,
            "patch_index": np.ascontiguousarray(self.visual.origin[0, : self.count]),
            "assignment": np.ascontiguousarray(self.visual.assignment[0]),
        }
        return save(arrays, metadata={name: str(value) for name, value in about.items()})
