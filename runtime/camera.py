"""The camera loop: frames come faster than a language model can answer; answers are about now.

Enters: a source of frames, something that encodes and something that answers. Leaves: answers,
each with the age of the frame it is about. Three threads: one keeps only the newest frame, one
encodes, one answers. Encoding the next frame overlaps writing the current answer and starts just in
time, so that the frame is not old when the language model is free. Every hand-over holds one item.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from engines.errors import BackendError, EngineError, OptionError, PictureError
from runtime.camera_parts import (
    Answerer,
    Arrival,
    CameraAnswer,
    Encoder,
    Estimate,
    Seen,
    Stall,
)
from runtime.frames import FrameSource
from runtime.pacing import at_their_own_pace
from runtime.stillness import Stillness, StillnessOptions
from runtime.vision import VisualTokens

_SLACK = 0.2
"""A frame, or its tokens, may wait this share of encode + prefill before it counts as old."""
_LEAST_SLACK_S = 0.005
"""Threads do not wake up faster than that."""
_MOST_FAILURES = 5
"""Failures in a row of the language model that end the loop."""
_TICK_S = 0.05
_JOIN_S = 2.0


@dataclass(frozen=True)
class CameraOptions:
    """How frames are watched.

    Attributes:
        question: what is asked about them; it may be changed while running.
        every_s: seconds from one answer's start to the next; 0 answers as fast as it can.
        every_frame: take each frame of a recording in turn, however long that takes.
        on_change: answer only when the scene has changed.
        reuse: keep the tokens and the answer of a scene that stands still.
        stillness: when a scene counts as still.
        stall_after_s: an answer that takes longer is reported while it is waited for.
    """

    question: str
    every_s: float = 0.0
    every_frame: bool = False
    on_change: bool = False
    reuse: bool = True
    stillness: StillnessOptions = field(default_factory=StillnessOptions)
    stall_after_s: float = 5.0

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise OptionError('The question is empty. Give one, for example --ask "What is ahead?"')
        if self.every_s < 0 or self.stall_after_s <= 0:
            raise OptionError("every_s must be 0 or more and stall_after_s more than 0.")


class CameraLoop:
    """Watches one source; iterate over `answers` and control it from any thread.

    Attributes:
        frames: how many were received.
        drops: frames that were not answered, by reason.
        source: where frames come from; its `errors` say what could not be read.
    """

    def __init__(
        self, source: FrameSource, encoder: Encoder, answerer: Answerer, options: CameraOptions
    ) -> None:
        self.source = source
        self.frames = 0
        self.drops: Counter[str] = Counter()
        self._encoder = encoder
        self._answerer = answerer
        self._options = options
        self._in_turn = options.every_frame and not source.live
        self._question = options.question
        self._stillness = Stillness(options.stillness)
        self._encode_s, self._prefill_s, self._decode_s, self._period_s = (
            Estimate() for _ in range(4)
        )
        self._changed = threading.Condition()
        self._arrival: Arrival | None = None
        self._arrived_s = 0.0
        self._last_visual: VisualTokens | None = None
        self._taken_visual: VisualTokens | None = None
        self._seen: Seen | None = None
        self._encoding = self._ended = self._paused = self._stopping = False
        self._wanted_s = self._due_s = 0.0
        self._asked_s: float | None = None
        self._out: queue.Queue[CameraAnswer | BaseException | None] = queue.Queue(maxsize=4)

    def answers(self) -> Generator[CameraAnswer | Stall, None, None]:
        """Run the loop and yield what comes of it, until the source ends or `stop` is called.

        Raises:
            FoveateError: the language model failed five times in a row.
        """
        threads = [
            threading.Thread(target=self._guarded, args=(work,), name=work.__name__, daemon=True)
            for work in (self._capture, self._encode, self._answer)
        ]
        for thread in threads:
            thread.start()
        reported_s = self._options.stall_after_s
        try:
            while True:
                try:
                    item = self._out.get(timeout=_TICK_S)
                except queue.Empty:
                    asked_s = self._asked_s
                    waited_s = 0.0 if asked_s is None else time.monotonic() - asked_s
                    if waited_s < self._options.stall_after_s:
                        reported_s = self._options.stall_after_s
                    elif waited_s >= reported_s:
                        reported_s = 2 * waited_s
                        yield Stall(waited_s)
                    if self._stopping:
                        return
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.stop()
            for thread in threads:
                # A thread that hangs in a driver or a backend is left behind; it is a daemon.
                thread.join(timeout=_JOIN_S)

    def stop(self) -> None:
        """End the loop and close the source; calling it again does nothing."""
        self._stopping = True  # before the lock: a signal handler may interrupt its holder
        self.source.close()

    def pause(self) -> None:
        """Answer no more frames until `resume`; the source goes on being read."""
        self._paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False

    def ask(self, question: str) -> None:
        """Change the question, from the next answer on.

        Raises:
            OptionError: it is empty.
        """
        if not question.strip():
            raise OptionError("The question is empty.")
        self._question = question

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._put(error)

    def _put(self, item: CameraAnswer | BaseException | None) -> None:
        while not self._stopping:
            try:
                self._out.put(item, timeout=_TICK_S)
            except queue.Full:
                continue
            return

    # The capture thread.

    def _capture(self) -> None:
        frames = self.source if self._in_turn else at_their_own_pace(self.source)
        for frame in frames:
            with self._changed:
                while self._in_turn and self._arrival is not None and not self._stopping:
                    self._changed.wait(_TICK_S)
                if self._stopping:
                    return
                now_s = time.monotonic()
                if self._arrival is not None:
                    self.drops["superseded"] += 1
                if self.frames:
                    self._period_s.add(now_s - self._arrived_s)
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
                    wait_s = self._wanted_s - self._encode_s.seconds - time.monotonic()
                    if wait_s <= 0 and not self._is_fresher_soon(arrival):
                        self._arrival, self._encoding = None, True
                        self._changed.notify_all()
                        return arrival
                    self._changed.wait(min(max(wait_s, 0.001), _TICK_S))
                else:
                    self._changed.wait(_TICK_S)
        return None

    def _slack_s(self) -> float:
        share_s = _SLACK * (self._encode_s.seconds + self._prefill_s.seconds)
        return max(share_s, _LEAST_SLACK_S)

    def _is_fresher_soon(self, arrival: Arrival) -> bool:
        """Say whether to wait for the next frame because this one is old already."""
        if self._in_turn or self._ended or not self._period_s.known:
            return False
        period_s = self._period_s.seconds
        if period_s > self._encode_s.seconds + self._prefill_s.seconds:
            return False
        return self._slack_s() < arrival.age_s() < 2 * period_s

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
        self._encode_s.add(done_s - started_s)
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
                if failures == _MOST_FAILURES:
                    raise
                continue
            finally:
                self._asked_s = None
                self._expect(0.0)
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
                elif now_s >= self._due_s and not self._paused:
                    self._seen = None
                    self._changed.notify_all()
                    if self._in_turn or self._ended or now_s - seen.done_s <= self._slack_s():
                        self._due_s = now_s + self._options.every_s
                        self._taken_visual = seen.visual
                        return seen
                    self.drops["stale"] += 1  # written while the last answer took longer
                    self._wanted_s = now_s
                    continue
                self._changed.wait(min(max(self._due_s - now_s, 0.001), _TICK_S))
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
            self._expect(self._decode_s.seconds)

        self._asked_s = time.monotonic()
        self._wanted_s = float("inf")  # nothing is encoded while the prompt is read
        said = self._answerer.answer(seen.visual, question, prefilled, lambda: self._stopping)
        self._prefill_s.add(said.prefill_ms / 1e3)
        self._decode_s.add(said.decode_ms / 1e3)
        return CameraAnswer(seen, question, said, age_ms, reused=False)

    def _expect(self, busy_s: float) -> None:
        """Say when the next frame's tokens will be wanted, so that they are ready just then."""
        with self._changed:
            self._wanted_s = max(self._due_s, time.monotonic() + busy_s)
            self._changed.notify_all()
