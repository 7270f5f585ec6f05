"""Decide when the camera loop encodes a frame and when its tokens are too old.

Nothing here reads a clock or waits: the caller gives the time, in seconds of any one clock, so a
test can play a day in a moment.
"""

from __future__ import annotations

from runtime.camera.parts import Estimate

_SLACK = 0.1
"""A frame, and its tokens once more, may wait this share of encode + prefill before it counts as
old: together they keep its age within 1.2 times what cannot be avoided."""
_LEAST_SLACK_S = 0.005
"""Threads do not wake up faster than that."""


class Timing:
    """What a loop knows of its own speed.

    Attributes:
        encode, prefill, decode: how long a round of frames takes to encode, and an answer to read
            its prompt and to be written.
        period: time between frames of a camera.
        due_s: the next answer is not to begin before that.
        wanted_s: tokens are wanted by then: encoding that ends earlier would give an older frame.
    """

    def __init__(self, every_s: float = 0.0) -> None:
        """Begin with nothing known.

        Args:
            every_s: seconds from one answer's start to the next; 0 answers as fast as it can.
        """
        self.encode, self.prefill, self.decode, self.period = (Estimate() for _ in range(4))
        self.due_s = self.wanted_s = 0.0
        self._every_s = every_s

    @property
    def slack_s(self) -> float:
        """How long a frame, or its tokens, may wait before it counts as old."""
        return max(_SLACK * (self.encode.mean + self.prefill.mean), _LEAST_SLACK_S)

    def encode_in_s(self, now_s: float) -> float:
        """Return how long to wait before encoding, so that the tokens are ready when wanted."""
        return self.wanted_s - self.encode.mean - now_s

    def is_fresher_soon(self, age_s: float) -> bool:
        """Say whether to wait for the next frame because this one is old already."""
        if not self.period.known:
            return False
        period_s = self.period.mean
        if period_s > self.encode.mean + self.prefill.mean:
            return False
        return self.slack_s < age_s < 2 * period_s

    def is_stale(self, done_s: float, now_s: float) -> bool:
        """Say whether tokens that were ready at ``done_s`` have waited too long."""
        return now_s - done_s > self.slack_s

    def begin_answer(self, now_s: float) -> None:
        """An answer begins: nothing is encoded while its prompt is read."""
        self.due_s = now_s + self._every_s
        self.wanted_s = float("inf")

    def expect_free(self, now_s: float, busy_s: float) -> None:
        """The language model will be free in that time, and not before an answer is due."""
        self.wanted_s = max(self.due_s, now_s + busy_s)
