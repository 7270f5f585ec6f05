"""Thresholds and smoothing scales, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.scales.ranges import LEVELS, count_magnitudes, find_threshold
from calibration.scales.smooth import (
    Channels,
    Sample,
    fake_quantize,
    smoothing_scale,
    try_smoothing,
)

BINS = 2048


@pytest.fixture
def heavy_tailed() -> np.ndarray:
    """Values near one, and a few up to thirty."""
    random = np.random.default_rng(0)
    values = random.standard_normal(200_000).astype(np.float32)
    values[:20] = random.uniform(20, 30, 20)
    return values


def threshold(values: np.ndarray, method: str) -> float:
    largest = float(np.abs(values).max())
    return find_threshold(count(values, largest), largest, method)


def count(values: np.ndarray, largest: float) -> np.ndarray:
    return count_magnitudes(values[:, None], largest, BINS, np.ones(len(values), np.float32))


def test_counts_are_a_histogram_of_magnitudes(heavy_tailed) -> None:
    largest = float(np.abs(heavy_tailed).max())
    counts = count(heavy_tailed, largest)
    expected, _ = np.histogram(np.abs(heavy_tailed), BINS, (0, largest))
    assert counts.sum() == heavy_tailed.size
    assert np.abs(counts - expected).sum() <= 1e-3 * heavy_tailed.size  # rounding at the edges
    assert count(np.zeros(5, np.float32), 0.0)[0] == 5


def test_max_spans_everything(heavy_tailed) -> None:
    assert threshold(heavy_tailed, "max") == np.abs(heavy_tailed).max()


def test_mse_has_the_least_squared_error(heavy_tailed) -> None:
    def error(limit: float) -> float:
        return float(np.square(fake_quantize(heavy_tailed, limit) - heavy_tailed).sum())

    largest = float(np.abs(heavy_tailed).max())
    tried = [error(largest * step / 128) for step in range(1, 129)]
    assert error(threshold(heavy_tailed, "mse")) <= 1.01 * min(tried)


@pytest.mark.parametrize("method", ["max", "mse"])
def test_an_activation_that_is_always_zero(method) -> None:
    assert threshold(np.zeros(100, np.float32), method) == 0


def test_scales_follow_equation_4_up_to_one_factor() -> None:
    x, w = np.array([8.0, 1.0, 2.0], np.float32), np.array([0.5, 1.0, 4.0], np.float32)
    scale = smoothing_scale(x, w, 0.75)
    expected = x**0.75 / w**0.25
    np.testing.assert_allclose(scale / scale[0], expected / expected[0], rtol=1e-5)
    assert np.log(scale).sum() == pytest.approx(0, abs=1e-5)


def test_dead_channels_keep_the_scale_one() -> None:
    x, w = np.array([0.0, 3.0, 2.0], np.float32), np.array([1.0, 0.0, 4.0], np.float32)
    np.testing.assert_array_equal(smoothing_scale(x, w, 0.5), 1)


def test_smoothing_and_shift_help_where_channels_differ() -> None:
    random = np.random.default_rng(1)
    spread = np.array([40.0, 1, 1, 1, 1, 1, 1, 1], np.float32)
    middle = np.array([0.0, 5, -5, 0, 0, 0, 0, 0], np.float32)
    sample = (random.uniform(-1, 1, (256, 8)) * spread + middle).astype(np.float32)
    channels = Channels(sample.min(axis=0), sample.max(axis=0), sample.mean(axis=0))
    weight = random.standard_normal((8, 16)).astype(np.float32)
    plain, *trials = try_smoothing(
        Sample(sample, np.ones(256, np.float32)), channels, [weight], (0.5, 0.8), "max"
    )
    assert plain.alpha is None
    assert not plain.shift.any()
    assert len(trials) == 5
    best = min(trials, key=lambda trial: trial.error)
    assert best.error < 0.5 * plain.error
    assert best.shift.any()


def test_fake_quantization_has_255_levels() -> None:
    values = np.linspace(-2, 2, 10_000, dtype=np.float32)
    rounded = fake_quantize(values, 1.0)
    assert len(np.unique(rounded)) == 2 * LEVELS + 1
    assert np.abs(rounded).max() == pytest.approx(1)
