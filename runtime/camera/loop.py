"""The camera loop: answers about the newest frames of one camera or several.

One thread for each source keeps its newest frame. One encodes a round, which is the newest frame of
every camera that has a new one, as one batch. One answers about the frames of a round in turn.
Encoding the next round overlaps writing the last answer of this one, and starts just in time, so
that frames are not old when the language model is free. Every hand-over is bounded. A source that
fails costs its own frames only.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from functools import partial

from engines.errors import BackendError, EngineError, OptionError, PictureError
from runtime.camera.camera_state import CameraState
from runtime.camera.pacing import at_their_own_pace
from runtime.camera.parts import (
    Answerer,
    CameraAnswer,
    CameraOptions,
    EncodedFrame,
    Encoder,
    QueuedFrame,
    Stall,
)
from runtime.camera.scene_change import Stillness
from runtime.camera.timing import Timing
from runtime.frames import Frame, FrameSource
from runtime.vision import VisualTokens

__all__ = ["CameraLoop", "CameraOptions"]

MOST_FAILURES = 5
"""Failures in a row of the language model that end the loop."""
_TICK_S = 0.05
"""How soon a waiting thread notices that the loop was stopped."""
_JOIN_S = 2.0


class CameraLoop:
    """Iterate over `answers`, and control it from any thread.

    Attributes:
        sources: where frames come from; their `errors` say what could not be read.
        frames: how many were received.
        drops: frames that were not answered, by reason.
    """

    def __init__(
        self,
        sources: Sequence[FrameSource],
        encoder: Encoder,
        answerer: Answerer,
        options: CameraOptions,
    ) -> None:
        self.sources = tuple(sources)
        self.frames = 0
        self.drops: Counter[str] = Counter()
        self._encoder, self._answerer, self._options = encoder, answerer, options
        self._question = options.question
        self._cameras = [
            CameraState(
                source,
                number,
                in_turn=options.every_frame and not source.live,
                stillness=Stillness(options.stillness),
            )
            for number, source in enumerate(sources)
        ]
        self._changed = threading.Condition()
        self._paused = self._stopping = self._encoding = False
        self._round: list[EncodedFrame] | None = None  # encoded and waiting to be answered
        self._timing = Timing(options.every_s)
        self._asked_s: float | None = None  # since when an answer is waited for
        self._failures = 0  # of the language model, in a row
        self._out: queue.Queue[CameraAnswer | BaseException | None] = queue.Queue(maxsize=4)

    @property
    def errors(self) -> Counter[str]:
        """What could not be read, of all cameras, by reason."""
        return sum((source.errors.counts.copy() for source in self.sources), Counter())

    def answers(self) -> Generator[CameraAnswer | Stall, None, None]:
        """Run the loop and yield what comes of it, until all sources end or `stop` is called.

        Raises:
            FoveateError: the language model failed five times in a row.
            Exception: what a driver raised, if every source was ended by that.
        """
        captures = [partial(self._capture, camera) for camera in self._cameras]
        threads = [
            threading.Thread(target=self._guarded, args=(work,), name="camera loop", daemon=True)
            for work in (*captures, self._encode, self._answer)
        ]
        for thread in threads:
            thread.start()
        try:
            yield from self._results()
        finally:
            self.stop()
            for thread in threads:  # one that hangs in a driver or a backend is left behind
                thread.join(timeout=_JOIN_S)

    def stop(self) -> None:
        """End the loop and close the sources; calling it again does nothing."""
        self._stopping = True  # before any lock: a signal handler may interrupt its holder
        for source in self.sources:
            source.close()

    def pause(self) -> None:
        """Answer no more frames until `resume`; the sources go on being read."""
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

    def _results(self) -> Generator[CameraAnswer | Stall, None, None]:
        reported_s = self._options.stall_after_s
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

    # A capture thread for each camera.

    def _capture(self, camera: CameraState) -> None:
        source = camera.source
        try:
            for frame in source if camera.in_turn else at_their_own_pace(source):
                if not self._queue(camera, frame):
                    return
        finally:
            with self._changed:
                camera.ended = True
                self._changed.notify_all()

    def _queue(self, camera: CameraState, frame: Frame) -> bool:
        """Keep a frame in place of the one before; False when the loop is over."""
        with self._changed:
            while camera.in_turn and camera.queued is not None and not self._stopping:
                self._changed.wait(_TICK_S)
            if self._stopping:
                return False
            now_s = time.monotonic()
            if camera.queued is not None:
                self.drops["superseded"] += 1
            if camera.frames and not camera.in_turn:
                self._timing.period.add(now_s - camera.arrived_s)
            camera.arrived_s = now_s
            camera.queued = QueuedFrame(frame, camera.frames, now_s, camera.number)
            camera.frames += 1
            self.frames += 1
            self._changed.notify_all()
            return True

    # The encoding thread.

    def _encode(self) -> None:
        while queued := self._next_to_encode():
            encoded = self._look(queued)
            with self._changed:
                self._encoding = False
                self._round = encoded or None
                self._changed.notify_all()

    def _next_to_encode(self) -> list[QueuedFrame]:
        """Wait for the moment to encode and return the newest frames; none when it is over."""
        with self._changed:
            while not self._stopping:
                queued = [camera.queued for camera in self._cameras if camera.queued]
                if not queued and all(camera.over for camera in self._cameras):
                    return []
                wait_s = self._timing.encode_in_s(time.monotonic())
                wanted = queued and self._round is None and not self._paused
                if wanted and wait_s <= 0 and not self._are_fresher_soon(queued):
                    for camera in self._cameras:
                        camera.queued = None
                    self._encoding = True
                    self._changed.notify_all()
                    return queued
                self._changed.wait(min(max(wait_s, 0.001), _TICK_S) if wanted else _TICK_S)
        return []

    def _are_fresher_soon(self, queued: Sequence[QueuedFrame]) -> bool:
        """Say whether to wait because even the youngest frame is old already."""
        if any(self._cameras[each.camera].keeps_all for each in queued):
            return False
        return self._timing.is_fresher_soon(min(each.age_s() for each in queued))

    def _look(self, queued: Sequence[QueuedFrame]) -> list[EncodedFrame]:
        """Encode what has changed, as one batch; of the others the tokens are kept."""
        changed: list[QueuedFrame] = []
        still: list[QueuedFrame] = []
        for each in queued:
            (still if self._is_still(each) else changed).append(each)
        started_s = time.monotonic()
        visuals = self._encode_batch(changed)
        done_s = time.monotonic()
        if any(visuals):
            self._timing.encode.add(done_s - started_s)
        share_ms = (done_s - started_s) * 1e3 / max(len(changed), 1)
        encoded = []
        for each, visual in zip(changed, visuals, strict=True):
            self._cameras[each.camera].visual = visual
            if visual is not None:
                encoded.append(EncodedFrame(each, visual, share_ms, False, done_s))
        for each in still:
            camera = self._cameras[each.camera]
            if self._options.on_change and camera.visual is camera.taken:
                self.drops["unchanged"] += 1
            elif camera.visual is not None:
                encoded.append(EncodedFrame(each, camera.visual, 0.0, True, done_s))
        return sorted(encoded, key=lambda each: each.queued.camera)

    def _is_still(self, queued: QueuedFrame) -> bool:
        """Say whether the tokens of the camera's last frame will do for this one."""
        if not (self._options.on_change or self._options.reuse):
            return False
        camera = self._cameras[queued.camera]
        moved = camera.stillness.has_changed(queued.frame.image)
        return camera.visual is not None and not moved

    def _encode_batch(self, queued: Sequence[QueuedFrame]) -> list[VisualTokens | None]:
        """Encode frames together; where that fails, one by one, so that a bad one is alone."""
        if not queued:
            return []
        try:
            return [*self._encoder.encode([each.frame.image for each in queued])]
        except (EngineError, PictureError) as error:
            if len(queued) > 1:
                return [visual for each in queued for visual in self._encode_batch([each])]
            self.drops["encoding failed"] += 1
            self._cameras[queued[0].camera].source.errors.count("encoding failed", error)
            return [None]

    # The answering thread.

    def _answer(self) -> None:
        while encoded := self._take_round():
            for each in encoded:
                if self._stopping:
                    return
                if (answer := self._try_to_answer(each, each is encoded[-1])) is not None:
                    self._put(answer)
        failures = [source.failure for source in self.sources]
        self._put(failures[-1] if all(failures) else None)

    def _take_round(self) -> list[EncodedFrame]:
        """Wait until an answer is due and tokens are there; none when it is over."""
        with self._changed:
            while not self._stopping:
                now_s = time.monotonic()
                if self._round is None:
                    if not self._encoding and all(camera.over for camera in self._cameras):
                        return []
                elif now_s >= self._timing.due_s and not self._paused:
                    taken, self._round = self._round, None
                    self._changed.notify_all()
                    if fresh := self._drop_stale(taken, now_s):
                        self._timing.begin_answer(now_s)
                        return fresh
                    self._timing.expect_free(now_s, 0.0)
                    continue
                self._changed.wait(min(max(self._timing.due_s - now_s, 0.001), _TICK_S))
        return []

    def _drop_stale(self, encoded: Sequence[EncodedFrame], now_s: float) -> list[EncodedFrame]:
        """Return the frames that are still worth an answer; the others are counted."""
        fresh = []
        for each in encoded:
            camera = self._cameras[each.queued.camera]
            if not camera.keeps_all and self._timing.is_stale(each.done_s, now_s):
                self.drops["stale"] += 1  # written while the last answer took longer
                continue
            camera.taken = each.visual
            fresh.append(each)
        return fresh

    def _try_to_answer(self, encoded: EncodedFrame, ends_round: bool) -> CameraAnswer | None:
        camera = self._cameras[encoded.queued.camera]
        try:
            camera.last = self._answer_one(encoded, camera, ends_round)
        except BackendError as error:
            self._failures += 1
            camera.taken = None
            self.drops["answering failed"] += 1
            camera.source.errors.count("answering failed", error)
            if self._failures == MOST_FAILURES:
                raise
            return None
        finally:
            self._asked_s = None
            if ends_round:
                self._expect_free(0.0)
        self._failures = 0
        return camera.last

    def _answer_one(
        self, encoded: EncodedFrame, camera: CameraState, ends_round: bool
    ) -> CameraAnswer:
        question = self._question
        last = camera.reusable(question, encoded.visual) if self._options.reuse else None
        if last is not None:
            age_ms = encoded.queued.age_s() * 1e3
            return CameraAnswer(encoded, question, last.answer, age_ms, reused=True)
        age_ms = 0.0

        def prefilled() -> None:
            nonlocal age_ms
            age_ms = encoded.queued.age_s() * 1e3
            if ends_round:
                self._expect_free(self._timing.decode.mean)

        self._asked_s = time.monotonic()
        answer = self._answerer.answer(encoded.visual, question, prefilled, lambda: self._stopping)
        self._timing.prefill.add(answer.milliseconds["prefill"] / 1e3)
        self._timing.decode.add(answer.milliseconds["decode"] / 1e3)
        if answer.finish == "broken_form":
            camera.source.errors.count("answer of another form", repr(answer.text))
        return CameraAnswer(encoded, question, answer, age_ms, reused=False)

    def _expect_free(self, busy_s: float) -> None:
        """Say when the next frame's tokens will be wanted, so that they are ready just then."""
        with self._changed:
            self._timing.expect_free(time.monotonic(), busy_s)
            self._changed.notify_all()
