"""One of a loop's cameras: its source, its newest frame and the last tokens and answer it gave."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.camera.parts import CameraAnswer, QueuedFrame
from runtime.camera.scene_change import Stillness
from runtime.frames import FrameSource
from runtime.vision import VisualTokens


@dataclass
class CameraState:
    """Shared by the threads of a loop; `queued` and `ended` change under its lock.

    Attributes:
        source: where frames come from; its `errors` say what could not be read.
        number: counted from 0.
        in_turn: each frame is taken, however long that takes.
        stillness: whether its scene has changed.
        queued: the newest frame that was not encoded yet.
        arrived_s: monotonic seconds when the last frame came.
        frames: how many came.
        ended: no more frames will come.
        visual: tokens of the last frame that was encoded; None where that failed.
        taken: those that an answer was begun about; None where answering failed.
        last: its last answer.
    """

    source: FrameSource
    number: int
    in_turn: bool
    stillness: Stillness
    queued: QueuedFrame | None = None
    arrived_s: float = 0.0
    frames: int = 0
    ended: bool = False
    visual: VisualTokens | None = None
    taken: VisualTokens | None = None
    last: CameraAnswer | None = None

    @property
    def over(self) -> bool:
        """Whether there is nothing left to encode, now or later."""
        return self.ended and self.queued is None

    @property
    def keeps_all(self) -> bool:
        """Whether a frame is worth an answer even when it is old: no newer one may come."""
        return self.in_turn or self.ended

    def reusable(self, question: str, visual: VisualTokens) -> CameraAnswer | None:
        """Return the last answer if it is one to this question about these very tokens.

        One that broke the form it must have is not given again: another try may keep it.
        """
        last = self.last
        if last is None or last.encoded.visual is not visual or last.question != question:
            return None
        return None if last.answer.finish == "broken_form" else last
