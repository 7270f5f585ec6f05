"""The camera loop: frames come faster than a language model can answer; answers are about now.

Enters: a source of frames, something that encodes and something that answers. Leaves: answers,
each with the age of the frame it is about. Three threads: one keeps only the newest frame, one
encodes, one answers. Encoding the next frame overlaps writing the current answer and starts just in
time, so that the frame is not old when the language model is free. Every hand-over holds one item.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from engines.errors import BackendError, EngineError, PictureError
from runtime.camera.answer_stream import TICK_S, AnswerStream
from runtime.camera.pacing import at_their_own_pace
from runtime.camera.parts import (
    Answerer,
    Arrival,
    CameraAnswer,
    CameraOptions,
    Encoder,
    Seen,
)
from runtime.camera.scene_change import Stillness
from runtime.camera.timing import Timing
from runtime.frames import FrameSource
from runtime.vision import VisualTokens

__all__ = ["CameraLoop", "CameraOptions"]

MOST_FAILURES = 5
"""Failures in a row of the language model that end the loop."""


class CameraLoop(AnswerStream):
    """Watches one source.

    Attributes:
        source: where frames come from; its `errors` say what could not be read.
    """

    def __init__(
        self, source: FrameSource, encoder: Encoder, answerer: Answerer, options: CameraOptions
    ) -> None:
        super().__init__(options)
        self.source = source
        self._encoder = encoder
        self._answerer = answerer
        self._in_turn = options.every_frame and not source.live
        self._stillness = Stillness(options.stillness)
        self._timing = Timing(options.every_s)
        self._arrival: Arrival | None = None
        self._arrived_s = 0.0
        self._last_visual: VisualTokens | None = None
        self._taken_visual: VisualTokens | None = None
        self._seen: Seen | None = None
        self._encoding = self._ended = False

    @property
    def errors(self) -> Counter[str]:
        """What could not be read, by reason."""
        return self.source.errors.counts

    def _threads(self) -> Sequence[Callable[[], None]]:
        return (self._capture, self._encode, self._answer)

    def _close_sources(self) -> None:
        self.source.close()

    # The capture thread.

    def _capture(self) -> None:
        frames = self.source if self._in_turn else at_their_own_pace(self.source)
        for frame in frames:
            with self._changed:
                while self._in_turn and self._arrival is not None and not self._stopping:
                    self._changed.wait(TICK_S)
                if self._stopping:
                    return
                now_s = time.monotonic()
                if self._arrival is not None:
                    self.drops["superseded"] += 1
                if self.frames:
                    self._timing.period.add(now_s - self._arrived_s)
                self._arrived_s = now_s
                self._arrival = Arrival(frame, self.frames, now_s)
                self.frames += 1
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # The encoding thread.

    def _encode(self) -> None:
        while (arrival := self._next_to_encode()) is not None:
            self._settle(self._look(arrival))

    def _settle(self, seen: Seen | None) -> None:
        with self._changed:
            self._encoding = False
            self._seen = seen
            self._changed.notify_all()

    def _next_to_encode(self) -> Arrival | None:
        """Wait for the moment to encode and return the newest frame; None when it is over."""
        with self._changed:
            while not self._stopping:
                arrival = self._arrival
                if arrival is None and self._ended:
                    return None
                if arrival is not None and self._seen is None and not self._paused:
                    wait_s = self._timing.encode_in_s(time.monotonic())
                    if wait_s <= 0 and not self._is_fresher_soon(arrival):
                        self._arrival, self._encoding = None, True
                        self._changed.notify_all()
                        return arrival
                    self._changed.wait(min(max(wait_s, 0.001), TICK_S))
                else:
                    self._changed.wait(TICK_S)
        return None

    def _is_fresher_soon(self, arrival: Arrival) -> bool:
        if self._in_turn or self._ended:
            return False
        return self._timing.is_fresher_soon(arrival.age_s())

    def _look(self, arrival: Arrival) -> Seen | None:
        image = arrival.frame.image
        options = self._options
        still = (options.on_change or options.reuse) and not self._stillness.has_changed(image)
        if still and options.on_change and self._last_visual is self._taken_visual:
            self.drops["unchanged"] += 1
            return None
        if still and self._last_visual is not None:
            return Seen(arrival, self._last_visual, 0.0, True, time.monotonic())
        started_s = time.monotonic()
        try:
            self._last_visual = self._encoder.encode(image)
        except (EngineError, PictureError) as error:
            self.source.errors.count("encoding failed", error)
            self.drops["encoding failed"] += 1
            self._last_visual = None
            return None
        done_s = time.monotonic()
        self._timing.encode.add(done_s - started_s)
        return Seen(arrival, self._last_visual, (done_s - started_s) * 1e3, False, done_s)

    # The answering thread.

    def _answer(self) -> None:
        last: CameraAnswer | None = None
        failures = 0
        while (seen := self._take_seen()) is not None:
            try:
                last = self._answer_one(seen, last)
                failures = 0
            except BackendError as error:
                failures += 1
                self._taken_visual = None
                self.drops["answering failed"] += 1
                self.source.errors.count("answering failed", error)
                if failures == MOST_FAILURES:
                    raise
                continue
            finally:
                self._asked_s = None
                self._expect_free(0.0)
            self._put(last)
        self._put(None)

    def _take_seen(self) -> Seen | None:
        """Wait until an answer is due and tokens are there; None when it is over."""
        with self._changed:
            while not self._stopping:
                now_s = time.monotonic()
                seen = self._seen
                if seen is None:
                    if self._ended and self._arrival is None and not self._encoding:
                        return None
                elif now_s >= self._timing.due_s and not self._paused:
                    self._seen = None
                    self._changed.notify_all()
                    whole = self._in_turn or self._ended
                    if whole or not self._timing.is_stale(seen.done_s, now_s):
                        self._timing.begin_answer(now_s)
                        self._taken_visual = seen.visual
                        return seen
                    self.drops["stale"] += 1  # written while the last answer took longer
                    self._timing.expect_free(now_s, 0.0)
                    continue
                self._changed.wait(min(max(self._timing.due_s - now_s, 0.001), TICK_S))
        return None

    def _answer_one(self, seen: Seen, last: CameraAnswer | None) -> CameraAnswer:
        question = self._question
        if (
            self._options.reuse
            and last is not None
            and seen.visual is last.seen.visual
            and question == last.question
        ):
            age_ms = seen.arrival.age_s() * 1e3
            return CameraAnswer(seen, question, last.said, age_ms, reused=True)
        age_ms = 0.0

        def prefilled() -> None:
            nonlocal age_ms
            age_ms = seen.arrival.age_s() * 1e3
            self._expect_free(self._timing.decode.mean)

        self._asked_s = time.monotonic()
        said = self._answerer.answer(seen.visual, question, prefilled, lambda: self._stopping)
        self._timing.prefill.add(said.prefill_ms / 1e3)
        self._timing.decode.add(said.decode_ms / 1e3)
        return CameraAnswer(seen, question, said, age_ms, reused=False)

    def _expect_free(self, busy_s: float) -> None:
        """Say when the next frame's tokens will be wanted, so that they are ready just then."""
        with self._changed:
            self._timing.expect_free(time.monotonic(), busy_s)
            self._changed.notify_all()
