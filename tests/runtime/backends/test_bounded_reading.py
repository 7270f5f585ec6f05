"""How long a server is waited for, with a clock that the test turns."""

from __future__ import annotations

import pytest

from engines.errors import BackendError
from runtime.backends.bounded_reading import Patience


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_silence_ends_it_unless_something_is_heard() -> None:
    clock = Clock()
    patience = Patience(10, 100, clock)
    clock.now = 9
    assert patience.left_seconds() == 1
    patience.hear()
    assert patience.left_seconds() == 10
    clock.now = 19
    with pytest.raises(TimeoutError, match="fell silent for 10 s"):
        patience.left_seconds()


def test_the_whole_has_an_end_however_much_is_heard() -> None:
    clock = Clock()
    patience = Patience(10, 15, clock)
    for clock.now in (5, 10, 14):
        patience.hear()
    assert patience.left_seconds() == 1
    clock.now = 15
    patience.hear()
    with pytest.raises(TimeoutError, match="took longer than 15 s"):
        patience.left_seconds()


def test_another_attempt_may_be_silent_again_but_not_last_longer() -> None:
    clock = Clock()
    patience = Patience(10, 15, clock)
    clock.now = 9
    patience.begin(100)
    assert patience.left_seconds() == 6


def test_bytes_are_counted_for_each_response() -> None:
    patience = Patience(10, 15, Clock())
    for _ in range(2):
        patience.begin(100)
        patience.count(100)
    with pytest.raises(BackendError, match="more than 100 bytes"):
        patience.count(1)
