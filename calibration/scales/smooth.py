"""Smoothing: move outlying channels of an activation into weights and biases.

A shift and a scale for each channel, X' = (X - shift) / scale, are chosen so that the layers'
outputs change least once X' and the weights are INT8. In floating point nothing changes: the
weights are multiplied by the scale and the biases take the shift.

Scales: SmoothQuant (Xiao et al. 2023, arXiv 2211.10438), eq. 4:
s_j = max|X_j|^alpha / max|W_j|^(1 - alpha). Shifts: Outlier Suppression+ (Wei et al. 2023, arXiv
2304.09145), eq. 4: z_j = (max X_j + min X_j) / 2, which makes a channel symmetric, as TensorRT's
zero points of 0 require. Deviations: alpha, and whether to shift, is searched for each activation
by the error of its layers' outputs; scales are divided by their geometric mean, which does not
change per-tensor quantization and keeps the magnitude for layers that stay in float16; a channel
that is zero in activation or weights keeps the scale 1.

The mean error of an output goes into the bias (Nagel et al. 2019, arXiv 1906.04721, section 4.2,
with the mean measured on the frames); the search assumes this correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.scales.ranges import LEVELS, Method, count_magnitudes, find_threshold

Matrix = NDArray[np.float32]
Vector = NDArray[np.float32]

_BINS = 2048
_COLUMNS = 512
"""Outputs of the layers that trials are judged on. Trials of whole matrices took most of the time
at CLIP-L size, and did not keep more patches of the bundled checkpoint."""


@dataclass(frozen=True)
class Channels:
    """What is known of each channel of an activation over all frames.

    Attributes:
        lowest: float32[K].
        highest: float32[K].
        mean: float32[K].
    """

    lowest: Vector
    highest: Vector
    mean: Vector

    @property
    def largest(self) -> Vector:
        """Largest magnitude of each channel, float32[K]."""
        return np.maximum(-self.lowest, self.highest)

    @property
    def middle(self) -> Vector:
        """The shift that makes each channel symmetric, float32[K]."""
        return np.asarray((self.lowest + self.highest) / 2, np.float32)

    def smoothed(self, shift: Vector, scale: Vector) -> Channels:
        """Return what they become as (X - shift) / scale."""
        values = (self.lowest, self.highest, self.mean)
        return Channels(*(np.asarray((v - shift) / scale, np.float32) for v in values))


@dataclass(frozen=True)
class Trial:
    """One way to smooth an activation, and what it costs.

    Attributes:
        alpha: of SmoothQuant's eq. 4, None for no scales.
        shift: float32[K].
        scale: float32[K].
        threshold: magnitude of the smoothed activation that becomes 127.
        error: squared error of the layers' outputs relative to their variance.
    """

    alpha: float | None
    shift: Vector
    scale: Vector
    threshold: float
    error: float


@dataclass(frozen=True)
class Sample:
    """Some rows of an activation over all frames.

    Attributes:
        rows: float32[S, K].
        weight: float32[S]; how many rows each stands for.
    """

    rows: Matrix
    weight: Vector

    def find_threshold(self, channels: Channels, method: Method, rows: Matrix) -> float:
        """Choose the magnitude that becomes 127.

        Args:
            channels: over all frames, as smooth as `rows`.
            method: how.
            rows: the same, smoothed, float32[S, K].
        """
        top = float(channels.largest.max())
        if method == "max":
            return top
        return find_threshold(count_magnitudes(rows, top, _BINS, self.weight), top, method)


def smoothing_scale(activation: Vector, weight: Vector, alpha: float) -> Vector:
    """Return eq. 4 with a geometric mean of one.

    Args:
        activation: float32[K]; max|X_j| of each channel.
        weight: float32[K]; max|W_j| over all matrices that read the channel.
        alpha: 0 leaves the outliers in the activation, 1 moves all of them into the weights.
    """
    alive = (activation > 0) & (weight > 0)
    if not alive.any():
        return np.ones_like(activation)
    x, w = (np.where(alive, v, 1.0).astype(np.float64) for v in (activation, weight))
    logarithms = alpha * np.log(x) - (1 - alpha) * np.log(w)
    logarithms -= logarithms[alive].mean()
    return np.where(alive, np.exp(logarithms), 1.0).astype(np.float32)


def try_smoothing(
    sample: Sample,
    channels: Channels,
    matrices: Sequence[Matrix],
    alphas: Sequence[float],
    method: Method,
) -> list[Trial]:
    """Try every alpha, with and without shift, on a sample of an activation.

    Args:
        sample: of the activation.
        channels: over all frames.
        matrices: the weights that read it, float32[K, N] each.
        alphas: what to try.
        method: how the range of the smoothed activation is chosen.

    Returns:
        The trial that changes nothing first, then the others.
    """
    reach = np.max([np.abs(matrix).max(axis=1) for matrix in matrices], axis=0)  # [K]
    columns = _spread_columns(matrices)  # [K, C]
    exact = sample.rows @ columns  # [S, C]
    power = float(np.square(exact - exact.mean(axis=0), dtype=np.float64).sum()) or 1.0
    trials = []
    for shift in (np.zeros_like(channels.mean), channels.middle):
        shifted = channels.smoothed(shift, np.ones_like(shift))
        wanted = exact - shift @ columns
        for alpha in (None, *alphas):
            scale = np.ones_like(shift)
            if alpha is not None:
                scale = smoothing_scale(shifted.largest, reach, alpha)
            smoothed = channels.smoothed(shift, scale)
            x: Matrix = (sample.rows - shift) / scale
            w: Matrix = columns * scale[:, None]
            threshold = sample.find_threshold(smoothed, method, x)
            rounded = fake_quantize(w, np.abs(w).max(axis=0))
            off = fake_quantize(x, threshold) @ rounded - wanted - smoothed.mean @ (rounded - w)
            error = float(np.square(off, dtype=np.float64).sum()) / power
            trials.append(Trial(alpha, shift, scale, threshold, error))
    return trials


def _spread_columns(matrices: Sequence[Matrix]) -> Matrix:
    """Return `_COLUMNS` columns, evenly from all matrices; all of them where there are fewer."""
    step = -(-sum(matrix.shape[1] for matrix in matrices) // _COLUMNS)
    return np.concatenate([matrix[:, ::step] for matrix in matrices], axis=1)


def fake_quantize(values: Matrix, threshold: float | Vector) -> Matrix:
    """Round values to symmetric INT8 and back; one threshold, or one for each column."""
    scale = np.maximum(np.asarray(threshold, np.float32), np.finfo(np.float32).tiny) / LEVELS
    return np.asarray(np.clip(np.round(values / scale), -LEVELS, LEVELS) * scale, np.float32)
