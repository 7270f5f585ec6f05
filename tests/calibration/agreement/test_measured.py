"""Mean, interval and worst of what was measured on the report's frames."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.agreement.measured import measure_agreement
from calibration.agreement.token_metrics import Difference, TokenAgreement


def picture(overlap: float) -> TokenAgreement:
    return TokenAgreement(overlap, 0.5, 0.9, 0.99, Difference(0.0, 0.0), 1, (), ())


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        found = measure_agreement([picture(value) for value in random.uniform(0.8, 1, 40)])
        covered += found.overlap.low <= 0.9 <= found.overlap.high
    assert 88 <= covered <= 99


def test_the_worst_picture_is_told() -> None:
    found = measure_agreement([picture(1.0)] * 15 + [picture(0.173)])
    assert (found.pictures, found.overlap.worst) == (16, 0.173)
    assert found.overlap.mean == pytest.approx((15 + 0.173) / 16)
    assert found.overlap.low < found.overlap.mean < found.overlap.high
    assert found.cosine.low == found.cosine.high == pytest.approx(0.99)


def test_squares_of_one_picture_are_no_more_certain_than_the_picture() -> None:
    values = np.random.default_rng(2).uniform(0.8, 1, 20)
    alone = measure_agreement([picture(value) for value in values])
    tiled = measure_agreement([picture(value) for value in values for _ in range(5)], [5] * 20)
    assert (tiled.pictures, tiled.squares, alone.squares) == (20, 100, 20)
    for name in ("mean", "low", "high", "worst"):
        assert getattr(tiled.overlap, name) == pytest.approx(getattr(alone.overlap, name))


def test_every_square_counts_once_however_many_a_picture_has() -> None:
    found = measure_agreement([picture(1.0)] * 3 + [picture(0.6)], [3, 1])
    assert found.overlap.mean == pytest.approx(0.9)
    assert found.overlap.low == pytest.approx(0.6)
    assert found.overlap.high == pytest.approx(1.0)
