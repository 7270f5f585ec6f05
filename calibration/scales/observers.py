"""Gather statistics of a tower's activations over frames, in bounded memory.

The first pass keeps each channel's extremes and a sample of rows, the second, after smoothing is
decided, a histogram of magnitudes. Both are saved every few seconds, so an interrupted calibration
continues and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.frames.dataset import Frames
from calibration.scales.layers import Site
from calibration.scales.ranges import count_magnitudes
from calibration.scales.resume import State, StateFile
from engines.errors import CalibrationError
from engines.ort import OrtSession
from engines.progress_bar import Progress
from runtime.vision.preprocess import PixelValues

Rows = NDArray[np.float32]
Update = Callable[[Site, Rows], dict[str, NDArray[Any]]]
"""From the activation of one frame, float32[R, K], to what is new, by name."""

CHANNELS, HISTOGRAMS = "channels", "histograms"
BINS = 2048
_SAVE_EVERY_S = 30.0
_JOIN: dict[str, Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]] = {
    "lowest": np.minimum,
    "highest": np.maximum,
    "sum": np.add,
    "rows": np.add,
    "counts": np.add,
    "sample": lambda before, new: np.concatenate([before, new]),
}


@dataclass(frozen=True)
class Recorder:
    """Runs frames through a graph up to the activations that are to be quantized.

    Attributes:
        model: the float32 graph; its outputs are not read.
        sites: whose activations are gathered.
        frames: all of them.
        states: where sums are kept.
        threads: CPU threads.
        progress: called for every frame.
    """

    model: ir.Model
    sites: Sequence[Site]
    frames: Frames
    states: StateFile
    threads: int | None
    progress: Progress

    def measure_channels(self, sample_rows: int) -> State:
        """Gather ``lowest/``, ``highest/`` and ``sum/SITE`` [K], ``rows/SITE``, ``sample/SITE``.

        Of every frame the first row (the class token, which chooses patches) and others by chance
        are sampled, about ``sample_rows`` over all frames: float32[R, K].

        Raises:
            CalibrationError: there are no frames, one is misshapen, an activation is not finite.
        """
        found = self.states.load()
        if found is not None and found.step == HISTOGRAMS:
            return found  # it was interrupted later on, and holds these sums as well
        share = max(2, -(-sample_rows // max(1, len(self.frames))))

        def begin(at: int) -> Update:
            random = np.random.default_rng(at)

            def update(site: Site, rows: Rows) -> dict[str, NDArray[Any]]:
                chosen = random.permutation(len(rows))[:share]
                chosen[0] = 0
                return {
                    f"lowest/{site.name}": rows.min(axis=0),
                    f"highest/{site.name}": rows.max(axis=0),
                    f"sum/{site.name}": rows.sum(axis=0, dtype=np.float64),
                    f"rows/{site.name}": np.array([len(rows)]),
                    f"sample/{site.name}": rows[chosen],
                }

            return update

        return self._gather(State(CHANNELS), begin, 0.0)

    def measure_histograms(
        self,
        channels: State,
        largest: Mapping[str, float],
        smoothed: Callable[[str, Rows], Rows],
    ) -> State:
        """Gather ``counts/SITE``, int64[BINS], of magnitudes from 0 to ``largest[SITE]``.

        Args:
            channels: from `measure_channels`; kept with what is gathered here.
            largest: by site, after smoothing.
            smoothed: smooths the activation of a site.

        Raises:
            CalibrationError: as `measure_channels`.
        """

        def update(site: Site, rows: Rows) -> dict[str, NDArray[Any]]:
            counts = count_magnitudes(smoothed(site.name, rows), largest[site.name], BINS)
            return {f"counts/{site.name}": counts}

        start = State(HISTOGRAMS, arrays=channels.arrays)
        return self._gather(start, lambda at: update, 0.5)

    def _gather(self, start: State, begin: Callable[[int], Update], behind: float) -> State:
        found = self.states.load()
        resumed = found if found is not None and found.step == start.step else start
        state, chain, saved = resumed, "", time.monotonic()
        try:
            with open_tap(self.model, self.sites, self.threads) as tap:
                for at, frame in enumerate(self.frames):
                    chain = _chain(chain, _checked(frame, at))
                    if at + 1 == resumed.seen and chain != resumed.chain:
                        raise self.states.refusal("other frames")
                    if at < resumed.seen:
                        continue
                    changed = _updated(state.arrays, tap(frame, at), self.sites, begin(at))
                    state = State(start.step, at + 1, chain, changed)
                    share = (at + 1) / len(self.frames)
                    self.progress(f"{start.step} of frame {at + 1}", behind + share / 2)
                    if time.monotonic() - saved > _SAVE_EVERY_S:
                        self.states.save(state)
                        saved = time.monotonic()
        finally:
            # Also when interrupted: a state holds whole frames, it is replaced and never changed.
            self.states.save(state)
        if state.seen == 0:
            raise CalibrationError("There are no frames to calibrate on, expected at least one.")
        return state


@contextmanager
def open_tap(
    model: ir.Model, sites: Sequence[Site], threads: int | None
) -> Iterator[Callable[[PixelValues, int], dict[str, Rows]]]:
    """Yield what runs a frame and returns each site's activation as float32[R, K].

    A convolution's activation is returned by channel too, `pixel_values` with K = 3.
    """
    graph = model.graph
    kept = list(graph.outputs)
    read = [site for site in sites if not site.source.is_graph_input()]
    graph.outputs[:] = [site.source for site in read]
    try:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "tapped.onnx"
            ir.save(model, file, external_data="tapped.data")
            graph.outputs[:] = kept
            with OrtSession(file, threads=threads) as session:
                name = session.input_names[0]

                def tap(pixels: PixelValues, at: int) -> dict[str, Rows]:
                    values = session.run({name: pixels})
                    values[name] = np.moveaxis(pixels, 1, -1)
                    found = {}
                    for site in sites:
                        rows = values[str(site.source.name)]
                        found[site.name] = rows.reshape(-1, rows.shape[-1])
                        _refuse_not_finite(found[site.name], site, at)
                    return found

                yield tap
    finally:
        graph.outputs[:] = kept


def _updated(
    arrays: Mapping[str, NDArray[Any]],
    activations: Mapping[str, Rows],
    sites: Sequence[Site],
    update: Update,
) -> dict[str, NDArray[Any]]:
    """Return the sums with one frame more."""
    merged = dict(arrays)
    for site in sites:
        for name, new in update(site, activations[site.name]).items():
            join = _JOIN[name.partition("/")[0]]
            merged[name] = join(arrays[name], new) if name in arrays else new
    return merged


def _chain(before: str, pixels: PixelValues) -> str:
    return hashlib.sha256(before.encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _checked(frame: PixelValues, at: int) -> PixelValues:
    if frame.dtype != np.float32 or frame.ndim != 4 or frame.shape[:2] != (1, 3):
        got = f"{frame.dtype}[{', '.join(map(str, frame.shape))}]"
        raise CalibrationError(
            f"frame {at + 1} is {got}, expected float32[1, 3, H, W]: what the bundle's "
            "preprocessing (`runtime.vision.preprocess`) makes of one picture."
        )
    if not np.isfinite(frame).all():
        raise CalibrationError(
            f"frame {at + 1} holds values that are not finite. Leave that frame out."
        )
    return frame


def _refuse_not_finite(rows: Rows, site: Site, at: int) -> None:
    if np.isfinite(rows).all():
        return
    bad = rows.size - int(np.isfinite(rows).sum())
    layers = ", ".join(layer.name for layer in site.layers)
    raise CalibrationError(
        f"{bad} of {rows.size} values that enter {layers} are not finite at frame {at + 1}. The "
        "weights before this layer are damaged or overflow; check the checkpoint with "
        "`python -m export.verify` on an fp32 bundle."
    )
