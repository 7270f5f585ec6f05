"""The data types and protocols of the camera loop.

Ages are measured on the monotonic clock, so that a wall clock set back changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engines.errors import OptionError
from runtime.camera.scene_change import StillnessOptions
from runtime.frames import Frame
from runtime.model import Answer
from runtime.vision import Pixels, VisualTokens


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


@dataclass(frozen=True, eq=False)
class QueuedFrame:
    """A frame and when the loop received it.

    Attributes:
        frame: the image.
        index: frames of its camera received before it.
        at_s: monotonic seconds.
        camera: which of the cameras it came from, counted from 0.
    """

    frame: Frame
    index: int
    at_s: float
    camera: int = 0

    def age_s(self) -> float:
        """Return how long ago the frame arrived."""
        return time.monotonic() - self.at_s


@dataclass(frozen=True, eq=False)
class EncodedFrame:
    """A frame that was encoded, or found equal to one that was.

    Attributes:
        queued: the frame.
        visual: its visual tokens.
        encode_ms: its share of what encoding the batch took; 0 where the tokens were kept.
        kept: whether the tokens are those of an earlier frame of a still scene.
        done_s: monotonic seconds when the tokens were there.
    """

    queued: QueuedFrame
    visual: VisualTokens
    encode_ms: float
    kept: bool
    done_s: float


class Encoder(Protocol):
    """Turns images into visual tokens."""

    def encode(self, images: Sequence[Pixels]) -> Sequence[VisualTokens]:
        """Encode images of any sizes as one batch; return the tokens of each.

        Args:
            images: uint8[H, W, 3] each, RGB.

        Raises:
            EngineError: the graph failed.
            PictureError: one is not an image the tower can take.
        """


class Answerer(Protocol):
    """Answers a question about visual tokens."""

    def answer(
        self,
        visual: VisualTokens,
        question: str,
        prefilled: Callable[[], None],
        interrupted: Callable[[], bool],
    ) -> Answer:
        """Answer; call ``prefilled`` before decoding, and end early once ``interrupted``.

        Raises:
            BackendError: the language model failed; it can be asked again.
            OptionError: the question cannot be asked.
        """


@dataclass(frozen=True, eq=False)
class CameraAnswer:
    """An answer about one frame.

    Attributes:
        encoded: the frame and its tokens.
        question: what was asked.
        answer: what was answered; of a still scene, the answer given before.
        age_ms: age of the frame when the first token was there.
        reused: nothing was computed: the scene and the question are those of the last answer.
    """

    encoded: EncodedFrame
    question: str
    answer: Answer
    age_ms: float
    reused: bool

    @property
    def milliseconds(self) -> dict[str, float]:
        """Time of each stage that was computed for this frame."""
        if self.reused:
            return {}
        visual = {} if self.encoded.kept else self.encoded.visual.milliseconds
        return visual | {name: self.answer.milliseconds[name] for name in ("prefill", "decode")}


@dataclass(frozen=True)
class Stall:
    """The language model has not answered for a while; the loop goes on waiting.

    Attributes:
        seconds: since it was asked.
    """

    seconds: float


@dataclass
class Estimate:
    """A running mean of which the newest value is a fifth.

    Attributes:
        mean: 0 until something is known.
        known: whether anything is.
    """

    mean: float = 0.0
    known: bool = False

    def add(self, value: float) -> None:
        """Take one more value."""
        self.mean = 0.8 * self.mean + 0.2 * value if self.known else value
        self.known = True
