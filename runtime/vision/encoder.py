"""The vision encoder of a bundle: preprocessing and the vision graph turn images into tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.errors import BundleError, EngineError, PictureError
from engines.frame_size import frame_size_of
from engines.manifest import ORDER_OUTPUT, WORTH_OUTPUT, VisionGraph
from engines.opening import open_session
from engines.session import Session
from runtime.vision.layouts import Layout, layout_of
from runtime.vision.parallel_resize import Bands
from runtime.vision.preprocess import check_picture, frames_batch
from runtime.vision.resize import Pixels
from runtime.vision.visual_tokens import Shown, VisualTokens

_OUTPUTS = ("visual_tokens", "valid_count", "patch_index", "assignment")


class VisionEncoder(AbstractContextManager["VisionEncoder"]):
    """The vision graph of a bundle, ready to run; use it as a context manager.

    Attributes:
        bundle: from `open_bundle`.
        graph: the budget's.
        layout: how a picture alone becomes squares, and their tokens a sequence.
        session: runs it.
        frame_size: of the camera frames that the graph takes; None: it takes pixels, and pictures
            of any size become those.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session | None = None,
        *,
        engine: str | None = None,
        threads: int | None = None,
        tokens: int | None = None,
        batch: int = 1,
        beside: VisionEncoder | None = None,
        finite: bool = True,
    ) -> None:
        """Load the graph.

        Args:
            bundle: from `open_bundle`.
            session: an engine that runs the graph; one is opened when left out. It stays the
                caller's to close.
            engine: which engine to open, a name of `engines.opening`; the target's own when
                left out.
            threads: CPU threads, for preprocessing and, when no session is given, the graph; left
                out, one per core.
            tokens: which of the bundle's graphs, by its number of visual tokens; the first when
                left out.
            batch: images that are usually encoded at once; see `engines.open_session`.
            beside: an encoder of the same bundle and engine. What both need is loaded once and
                stays the other one's to close.
            finite: refuse tokens that hold NaN or infinity. Only who looks for them allows them.

        Raises:
            OptionError: the bundle has no graph with that many tokens.
            EngineError: the graph cannot be loaded.
            BundleError: the graph lacks an output the runtime reads.
        """
        self.bundle = bundle
        self.graph: VisionGraph = bundle.vision(tokens)
        self._layouts: dict[Shown, Layout] = {}
        self.layout = self.layout_of("alone")
        if session is None and beside is not None and beside.graph.file == self.graph.file:
            session = beside.session
        self._owned = session is None
        self._finite = finite
        self._bands = Bands(threads)
        file = bundle.path(self.graph.file)
        self.session: Session = (
            open_session(
                bundle,
                self.graph,
                engine=engine,
                threads=threads,
                batch=batch * self.layout.most_squares,
                beside=None if beside is None else beside.session,
            )
            if session is None
            else session
        )
        absent = [name for name in _OUTPUTS if name not in self.session.output_names]
        if absent or len(self.session.input_names) != 1:
            self.close()
            raise BundleError(
                f"{file} has the inputs {', '.join(self.session.input_names)} and the outputs "
                f"{', '.join(self.session.output_names)}, expected one input and at least "
                f"{', '.join(_OUTPUTS)}. Build the bundle again with `python -m export.build`."
            )
        first = bundle.stages(self.graph)[0]
        self.frame_size = frame_size_of(first)
        self._dtype = np.dtype(first.inputs[0].dtype)

    def encode(self, images: Pixels | Sequence[Pixels], shown: Shown = "alone") -> VisualTokens:
        """Turn images into visual tokens.

        Args:
            images: RGB, uint8[B, H, W, 3], or a list of uint8[H, W, 3] of any sizes. An image in
                BGR order (OpenCV's) cannot be told from one in RGB: give it as
                ``image[:, :, ::-1]``, which costs nothing.
            shown: how each of them is shown: most checkpoints make no difference.

        Raises:
            PictureError: a wrong shape or dtype, no images, or one that is not of the shape of the
                frames that the graph takes.
            EngineError: the graph failed, or gave what no exported graph gives.
        """
        _check_images(images)
        layout = self.layout_of(shown)
        started = time.perf_counter()
        given: NDArray[Any]
        if self.frame_size is None:
            given = layout.pixel_values(images, self._bands)  # [S, 3, H, W]
        else:
            given = frames_batch(images, self.frame_size, self._bands)  # [B, H, W, 3]
        prepared = time.perf_counter()
        name = self.session.input_names[0]
        outputs = self.session.run({name: given.astype(self._dtype, copy=False)})
        tokens, valid, origin, assignment = (outputs[name] for name in _OUTPUTS)
        order, worth = outputs.get(ORDER_OUTPUT), outputs.get(WORTH_OUTPUT)
        squares = VisualTokens(
            tokens=tokens.astype(np.float32, copy=False),
            valid=valid.astype(np.int64, copy=False),
            origin=origin.astype(np.int64, copy=False),
            assignment=assignment.astype(np.int64, copy=False),
            milliseconds={},
            order=None if order is None else order.astype(np.int64, copy=False),
            worth=None if worth is None else worth.astype(np.float32, copy=False),
        )
        self._check_outputs(squares, len(given))
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        seen = layout.assemble(squares.first(self.graph.reducer.tokens), sizes)
        spent = {
            "preprocess": (prepared - started) * 1e3,
            "encode": (time.perf_counter() - prepared) * 1e3,
        }
        return replace(seen, milliseconds=spent)

    def layout_of(self, shown: Shown) -> Layout:
        """Return the layout of pictures that are shown in a way; `layout` is that of one alone.

        Raises:
            BundleError: a part of it cannot be read.
        """
        if shown not in self._layouts:
            self._layouts[shown] = layout_of(self.bundle, self.graph, shown)
        return self._layouts[shown]

    def _check_outputs(self, seen: VisualTokens, batch: int) -> None:
        """Refuse what no graph of ours gives: 0.1 ms, and the rest of the runtime can rely on it.

        Raises:
            EngineError: a wrong shape, a number that is none, or an index out of range.
        """
        count, patches = self.graph.leaves, self.graph.patch_rows * self.graph.patch_columns
        arrays: tuple[NDArray[Any], ...] = (seen.tokens, seen.valid, seen.origin, seen.assignment)
        width = self.bundle.manifest.text.hidden_size
        expected = ((batch, count, width), (batch,), (batch, count), (batch, patches))
        problems = [
            f"{name} is [{', '.join(map(str, array.shape))}], expected "
            f"[{', '.join(map(str, shape))}]"
            for name, array, shape in zip(_OUTPUTS, arrays, expected, strict=True)
            if array.shape != shape
        ]
        ranges = [(0, count), (-1, patches - 1), (-count - 1, count - 1)]
        checked = list(zip(_OUTPUTS[1:], arrays[1:], ranges, strict=True))
        if seen.order is not None:
            checked.append((ORDER_OUTPUT, seen.order, (-1, count - 1)))
        if seen.worth is not None:
            checked.append((WORTH_OUTPUT, seen.worth, (0, np.finfo(np.float32).max)))
        for name, array, (low, high) in checked:
            if array.size and not low <= array.min() <= array.max() <= high:
                problems.append(
                    f"{name} goes from {array.min()} to {array.max()}, expected {low} to {high}"
                )
        if self._finite and not np.isfinite(seen.tokens).all():
            problems.append(f"{_OUTPUTS[0]} holds numbers that are not finite")
        if problems:
            raise EngineError(
                f"{self.bundle.root}: {self.graph.file} gave what no exported graph gives: "
                f"{'; '.join(problems)}. Build the bundle again; if that does not help, try "
                "another engine with --engine."
            )

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graph, unless the session was given; calling it again does nothing."""
        self._bands.close()
        if self._owned:
            self.session.close()


def _check_images(images: Pixels | Sequence[Pixels]) -> None:
    if isinstance(images, np.ndarray) and images.ndim == 3:
        got = f"{images.dtype}[{', '.join(map(str, images.shape))}]"
        raise PictureError(
            f"images is {got}, expected a batch uint8[B, H, W, 3] or a list of images. Give one "
            "image as `image[None]`."
        )
    if not isinstance(images, np.ndarray | list | tuple):
        raise PictureError(
            f"images is a {type(images).__name__}, expected uint8[B, H, W, 3] or a list of "
            "uint8[H, W, 3]."
        )
    if len(images) == 0:
        raise PictureError("There are no images to encode, expected at least one.")
    for at, image in enumerate(images):
        check_picture(image, f"images[{at}]")
