"""The camera loop's decisions about time, played on a clock of the test's own.

A simulation of the three threads asks `Timing` what the loop asks it, at the same moments.
"""

from __future__ import annotations

import numpy as np
import pytest

from runtime.camera.timing import Timing


def learned(encode_s: float, prefill_s: float, decode_s: float, period_s: float = 1 / 30) -> Timing:
    timing = Timing()
    for estimate, seconds in (
        (timing.encode, encode_s),
        (timing.prefill, prefill_s),
        (timing.decode, decode_s),
        (timing.period, period_s),
    ):
        estimate.add(seconds)
    return timing


def test_nothing_is_encoded_while_the_prompt_is_read() -> None:
    timing = learned(0.1, 0.1, 0.5)
    timing.begin_answer(now_s=10.0)
    assert timing.encode_in_s(now_s=1e9) == float("inf")
    timing.expect_free(now_s=10.1, busy_s=0.5)  # until 10.6: encoding begins at 10.5
    assert timing.encode_in_s(now_s=10.2) == pytest.approx(0.3)
    assert timing.encode_in_s(now_s=10.5) == pytest.approx(0.0)


def test_an_answer_that_is_due_later_is_encoded_later() -> None:
    timing = Timing(every_s=2.0)
    timing.encode.add(0.1)
    timing.begin_answer(now_s=10.0)
    timing.expect_free(now_s=10.3, busy_s=0.2)
    assert timing.due_s == 12.0
    assert timing.encode_in_s(now_s=10.3) == pytest.approx(1.6)


def test_tokens_may_wait_a_tenth_of_what_they_cost() -> None:
    timing = learned(0.1, 0.1, 0.5)
    assert timing.slack_s == pytest.approx(0.02)
    assert not timing.is_stale(done_s=5.0, now_s=5.019)
    assert timing.is_stale(done_s=5.0, now_s=5.021)
    assert Timing().slack_s == 0.005  # nothing known: no less than a thread takes to wake up


def test_an_old_frame_gives_way_to_one_that_is_about_to_come() -> None:
    timing = learned(0.1, 0.1, 0.5, period_s=0.05)
    assert not timing.is_fresher_soon(age_s=0.015)  # fresh enough
    assert timing.is_fresher_soon(age_s=0.045)
    assert not timing.is_fresher_soon(age_s=0.11)  # the camera seems to have stopped
    assert not learned(0.1, 0.1, 0.5, period_s=0.3).is_fresher_soon(age_s=0.1)  # not worth it
    assert not Timing().is_fresher_soon(age_s=1.0)


def ages_over_cost(
    encode_s: float, prefill_s: float, decode_s: float, fps: float, seconds: float = 60.0
) -> list[float]:
    """Play the loop and return, for each answer, age of its frame over encode + prefill."""
    rng = np.random.default_rng(0)
    timing = Timing()
    timing.period.add(1 / fps)
    now_s, ratios = 0.0, []
    free_s = 0.0  # when the language model is free

    def arrived_s(at_s: float) -> float:
        return np.floor(at_s * fps) / fps

    while now_s < seconds:
        now_s += max(timing.encode_in_s(now_s), 0.0)
        while timing.is_fresher_soon(now_s - arrived_s(now_s)):
            now_s += 0.001
        frame_s = arrived_s(now_s)
        spent_s = encode_s * rng.uniform(0.97, 1.03)
        now_s += spent_s
        timing.encode.add(spent_s)
        taken_s = max(now_s, free_s)
        if timing.is_stale(now_s, taken_s):
            now_s = taken_s
            timing.expect_free(now_s, 0.0)
            continue
        timing.begin_answer(taken_s)
        first_s = taken_s + prefill_s * rng.uniform(0.97, 1.03)
        timing.prefill.add(first_s - taken_s)
        ratios.append((first_s - frame_s) / (encode_s + prefill_s))
        timing.expect_free(first_s, timing.decode.mean)
        spent_s = decode_s * rng.uniform(0.9, 1.1)
        timing.decode.add(spent_s)
        now_s, free_s = first_s, first_s + spent_s
    return ratios


@pytest.mark.parametrize(
    ("encode_s", "prefill_s", "decode_s", "fps"),
    [
        (0.020, 0.040, 0.060, 30.0),
        (0.100, 0.100, 0.400, 30.0),
        (0.300, 0.600, 2.000, 30.0),
        (0.040, 0.200, 0.010, 60.0),
    ],
)
def test_answers_are_about_now(
    encode_s: float, prefill_s: float, decode_s: float, fps: float
) -> None:
    """The frame's age at the first token stays near what cannot be avoided."""
    ratios = ages_over_cost(encode_s, prefill_s, decode_s, fps)[3:]  # the first ones learn
    assert len(ratios) > 10
    assert np.percentile(ratios, 50) <= 1.1
    assert np.percentile(ratios, 99) <= 1.2
