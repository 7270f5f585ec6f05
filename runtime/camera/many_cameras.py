"""Several cameras, one vision engine: the newest frame of each, encoded as one batch.

Enters: sources, something that encodes batches and something that answers. Leaves: answers, each
with the name of its source. One thread for each source keeps its newest frame; one encodes a round,
a frame of every camera that has a new one; one answers about them in turn. The next round is
encoded while the last answer of this one is written. A camera that fails costs its own frames only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from engines.errors import BackendError, EngineError, PictureError
from runtime.camera.answer_stream import TICK_S, AnswerStream
from runtime.camera.loop import MOST_FAILURES
from runtime.camera.pacing import at_their_own_pace
from runtime.camera.parts import (
    Answerer,
    Arrival,
    BatchEncoder,
    CameraAnswer,
    CameraOptions,
    Seen,
)
from runtime.camera.scene_change import Stillness
from runtime.frames import FrameSource
from runtime.vision import VisualTokens


@dataclass
class _Camera:
    """One source and where it stands; shared by the threads, changed under the loop's lock."""

    source: FrameSource
    number: int
    in_turn: bool
    stillness: Stillness
    arrival: Arrival | None = None
    frames: int = 0
    ended: bool = False
    visual: VisualTokens | None = None  # of the last frame that was encoded
    last: CameraAnswer | None = field(default=None, repr=False)


class ManyCameras(AnswerStream):
    """Watches several sources.

    Attributes:
        sources: where frames come from; their `errors` say what could not be read.
    """

    def __init__(
        self,
        sources: Sequence[FrameSource],
        encoder: BatchEncoder,
        answerer: Answerer,
        options: CameraOptions,
    ) -> None:
        super().__init__(options)
        self.sources = tuple(sources)
        self._encoder = encoder
        self._answerer = answerer
        self._cameras = [
            _Camera(
                source,
                number,
                options.every_frame and not source.live,
                Stillness(options.stillness),
            )
            for number, source in enumerate(sources)
        ]
        self._round: list[Seen] | None = None
        self._round_wanted = True
        self._encoding = False
        self._due_s = 0.0
        self._failures = 0

    @property
    def errors(self) -> Counter[str]:
        """What could not be read, of all cameras, by reason."""
        return sum((source.errors.counts.copy() for source in self.sources), Counter())

    def _threads(self) -> Sequence[Callable[[], None]]:
        captures = [partial(self._capture, camera) for camera in self._cameras]
        return (*captures, self._encode, self._answer)

    def _close_sources(self) -> None:
        for source in self.sources:
            source.close()

    # One capture thread for each camera.

    def _capture(self, camera: _Camera) -> None:
        try:
            self._keep_newest(camera)
        except Exception as error:  # a driver's: the other cameras go on
            camera.source.errors.count("source failed", repr(error))
        finally:
            with self._changed:
                camera.ended = True
                self._changed.notify_all()

    def _keep_newest(self, camera: _Camera) -> None:
        source = camera.source
        for frame in source if camera.in_turn else at_their_own_pace(source):
            with self._changed:
                while camera.in_turn and camera.arrival is not None and not self._stopping:
                    self._changed.wait(TICK_S)
                if self._stopping:
                    return
                if camera.arrival is not None:
                    self.drops["superseded"] += 1
                camera.arrival = Arrival(frame, camera.frames, time.monotonic(), camera.number)
                camera.frames += 1
                self.frames += 1
                self._changed.notify_all()

    # The encoding thread.

    def _encode(self) -> None:
        while arrivals := self._next_to_encode():
            seen = self._look(arrivals)
            with self._changed:
                self._encoding = False
                self._round = seen or None
                self._round_wanted = not seen
                self._changed.notify_all()

    def _next_to_encode(self) -> list[Arrival]:
        """Wait until a round is wanted and return the newest frames; none when it is over."""
        with self._changed:
            while not self._stopping:
                arrivals = [camera.arrival for camera in self._cameras if camera.arrival]
                if not arrivals and all(camera.ended for camera in self._cameras):
                    return []
                wait_s = self._due_s - time.monotonic()
                if arrivals and self._round_wanted and not self._paused and wait_s <= 0:
                    for camera in self._cameras:
                        camera.arrival = None
                    self._encoding = True
                    self._changed.notify_all()
                    return arrivals
                self._changed.wait(min(max(wait_s, 0.001), TICK_S))
        return []

    def _look(self, arrivals: Sequence[Arrival]) -> list[Seen]:
        """Encode what has changed, as one batch; of the others the tokens are kept."""
        options = self._options
        changed: list[Arrival] = []
        still: list[Arrival] = []
        for arrival in arrivals:
            camera = self._cameras[arrival.camera]
            may_keep = (options.on_change or options.reuse) and camera.visual is not None
            moved = camera.stillness.has_changed(arrival.frame.image)
            (still if may_keep and not moved else changed).append(arrival)
        started_s = time.monotonic()
        encoded = self._encode_batch(changed)
        done_s = time.monotonic()
        share_ms = (done_s - started_s) * 1e3 / max(len(changed), 1)
        seen = []
        for arrival, visual in zip(changed, encoded, strict=True):
            self._cameras[arrival.camera].visual = visual
            if visual is not None:
                seen.append(Seen(arrival, visual, share_ms, False, done_s))
        for arrival in still:
            camera = self._cameras[arrival.camera]
            if options.on_change and camera.last and camera.last.seen.visual is camera.visual:
                self.drops["unchanged"] += 1
            elif camera.visual is not None:
                seen.append(Seen(arrival, camera.visual, 0.0, True, done_s))
        return sorted(seen, key=lambda each: each.arrival.camera)

    def _encode_batch(self, arrivals: Sequence[Arrival]) -> list[VisualTokens | None]:
        """Encode frames together; where that fails, one by one, so that a bad one is alone."""
        if not arrivals:
            return []
        try:
            return [*self._encoder.encode_batch([arrival.frame.image for arrival in arrivals])]
        except (EngineError, PictureError) as error:
            if len(arrivals) > 1:
                return [visual for arrival in arrivals for visual in self._encode_batch([arrival])]
            self.drops["encoding failed"] += 1
            self._cameras[arrivals[0].camera].source.errors.count("encoding failed", error)
            return [None]

    # The answering thread.

    def _answer(self) -> None:
        while (seen := self._take_round()) is not None:
            for number, each in enumerate(seen):
                if self._stopping:
                    return
                self._put_answer(each, number == len(seen) - 1)
        self._put(None)

    def _take_round(self) -> list[Seen] | None:
        with self._changed:
            while not self._stopping:
                if self._round is not None and not self._paused:
                    taken, self._round = self._round, None
                    self._due_s = time.monotonic() + self._options.every_s
                    return taken
                over = all(camera.ended and not camera.arrival for camera in self._cameras)
                if over and self._round is None and not self._encoding:
                    return None
                self._changed.wait(TICK_S)
        return None

    def _put_answer(self, seen: Seen, ends_round: bool) -> None:
        camera = self._cameras[seen.arrival.camera]
        try:
            camera.last = self._answer_one(seen, camera.last, ends_round)
            self._failures = 0
        except BackendError as error:
            self._failures += 1
            self.drops["answering failed"] += 1
            camera.source.errors.count("answering failed", error)
            if self._failures == MOST_FAILURES:
                raise
            return
        finally:
            self._asked_s = None
            if ends_round:
                self._want_round()
        self._put(camera.last)

    def _answer_one(self, seen: Seen, last: CameraAnswer | None, ends_round: bool) -> CameraAnswer:
        question = self._question
        same = last is not None and last.seen.visual is seen.visual and last.question == question
        if self._options.reuse and last is not None and same:
            return CameraAnswer(seen, question, last.said, seen.arrival.age_s() * 1e3, reused=True)
        age_ms = 0.0

        def prefilled() -> None:
            nonlocal age_ms
            age_ms = seen.arrival.age_s() * 1e3
            if ends_round:
                self._want_round()

        self._asked_s = time.monotonic()
        said = self._answerer.answer(seen.visual, question, prefilled, lambda: self._stopping)
        return CameraAnswer(seen, question, said, age_ms, reused=False)

    def _want_round(self) -> None:
        with self._changed:
            if self._round is None and not self._encoding:
                self._round_wanted = True
                self._changed.notify_all()
