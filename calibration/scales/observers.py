"""Gather statistics of a tower's activations over frames, in one pass and in bounded memory.

Each channel's extremes and mean are exact; what else is decided is decided on a sample of rows.
They are saved every minute, so an interrupted calibration continues and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.frames.dataset import Frames
from calibration.scales.attention import AttentionRange, find_attentions
from calibration.scales.layers import Site, find_sites
from calibration.scales.resume import State, StateFile
from calibration.scales.statistics import (
    CHOSEN,
    Statistics,
    add_statistics,
    read_attention,
    read_statistics,
)
from engines.errors import CalibrationError
from engines.ort import OrtSession
from engines.progress_bar import Progress
from runtime.vision.preprocess import PixelValues

Chosen = NDArray[np.int64]

CHANNELS = "channels"
_FEWEST_ROWS = 4
_SAVE_EVERY_S = 60.0
Found = tuple[dict[str, Statistics], dict[str, AttentionRange]]
"""What one frame shows, by site and by attention."""

_JOIN: dict[str, Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]] = {
    "lowest": np.minimum,
    "highest": np.maximum,
    "sum": np.add,
    "rows": np.add,
    "query": np.maximum,
    "key": np.maximum,
    "value_lowest": np.minimum,
    "value_highest": np.maximum,
}


@dataclass(frozen=True)
class Recorder:
    """Runs frames through a graph up to the activations that are to be quantized.

    Attributes:
        graph_file: the float32 graph, its weights beside it; its outputs are not computed.
        frames: all of them.
        states: where sums are kept.
        threads: CPU threads.
        progress: called for every frame.
    """

    graph_file: Path
    frames: Frames
    states: StateFile
    threads: int | None
    progress: Progress

    def measure_channels(self, sample_rows: int) -> State:
        """Gather ``lowest/``, ``highest/`` and ``sum/SITE`` [K], ``rows/SITE`` and a sample.

        Of every frame the first row (the class token), the largest and others by chance are
        sampled, about ``sample_rows`` over all frames: ``sample/SITE``, float32[F, S, K], each
        standing for as many rows as ``weight/SITE``, float32[F, S], says. Of attentions
        ``query/``, ``key/``, ``value_lowest/`` and ``value_highest/ATTENTION``.

        Raises:
            CalibrationError: there are no frames, one is misshapen, an activation is not finite.
        """
        count = max(1, len(self.frames))
        share = max(_FEWEST_ROWS, -(-sample_rows // count))
        found = self.states.load()
        start = found if found is not None else State(CHANNELS)
        state, chain, saved = start, "", time.monotonic()
        try:
            with open_tap(self.graph_file, self.threads) as tap:
                for at, frame in enumerate(self.frames):
                    chain = _chain(chain, _checked(frame, at))
                    if at + 1 == start.seen and chain != start.chain:
                        raise self.states.refusal("other frames")
                    if at < start.seen:
                        continue
                    arrays = _updated(state.arrays, tap(frame, at, share), at, count)
                    state = State(CHANNELS, at + 1, chain, arrays)
                    self.progress(f"{CHANNELS} of frame {at + 1}", (at + 1) / count)
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
    graph_file: Path, threads: int | None
) -> Iterator[Callable[[PixelValues, int, int], Found]]:
    """Yield what runs a frame, its number and how many rows to sample to statistics.

    Args:
        graph_file: the float32 graph, its weights beside it; a variant is written there.
        threads: CPU threads.
    """
    model = ir.load(graph_file)
    sites, attentions = find_sites(model), find_attentions(model)
    add_statistics(model, sites, attentions)
    file = graph_file.with_name("statistics.onnx")
    ir.save(model, file)
    with OrtSession(file, threads=threads) as session:
        name = session.input_names[0]

        def tap(pixels: PixelValues, at: int, share: int) -> Found:
            chosen = np.random.default_rng(at).integers(0, 2**31, share - 2)
            values = session.run({name: pixels, CHOSEN: chosen})
            found = {}
            for number, site in enumerate(sites):
                found[site.name] = read_statistics(values, number)
                _refuse_not_finite(found[site.name], site, at)
            ranges = (read_attention(values, number) for number in range(len(attentions)))
            return found, dict(zip((one.name for one in attentions), ranges, strict=True))

        yield tap


def _updated(
    arrays: Mapping[str, NDArray[Any]], found: Found, at: int, frames: int
) -> dict[str, NDArray[Any]]:
    """Return the sums with one frame more; samples go to a place that no state before counts."""
    merged = dict(arrays)
    statistics, attentions = found
    sums: dict[str, NDArray[Any]] = {}
    for name, one in attentions.items():
        sums[f"query/{name}"], sums[f"key/{name}"] = np.array([one.query]), np.array([one.key])
        sums[f"value_lowest/{name}"], sums[f"value_highest/{name}"] = one.lowest, one.highest
    for site, of_site in statistics.items():
        sums[f"lowest/{site}"], sums[f"highest/{site}"] = of_site.lowest, of_site.highest
        sums[f"sum/{site}"] = of_site.total.astype(np.float64)
        sums[f"rows/{site}"] = np.array([of_site.rows])
    for name, new in sums.items():
        join = _JOIN[name.split("/")[0]]
        merged[name] = join(arrays[name], new) if name in arrays else new
    for site, of_site in statistics.items():
        for what, rows in (("sample", of_site.sample), ("weight", of_site.weight)):
            name = f"{what}/{site}"
            if name not in merged:
                merged[name] = np.zeros((frames, *rows.shape), np.float32)
            merged[name][at] = rows
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


def _refuse_not_finite(found: Statistics, site: Site, at: int) -> None:
    if np.isfinite(found.total).all():  # a NaN or infinity anywhere is in a sum
        return
    layers = ", ".join(layer.name for layer in site.layers)
    raise CalibrationError(
        f"values that enter {layers} are not finite at frame {at + 1}. The weights before this "
        "layer are damaged or overflow; check the checkpoint with `python -m export.verify` on an "
        "fp32 bundle."
    )
