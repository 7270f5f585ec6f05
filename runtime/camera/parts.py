"""What the camera loop works with, and what its threads hand to each other.

Ages are measured on the monotonic clock, so that a wall clock set back changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engines.errors import OptionError
from runtime.camera.scene_change import StillnessOptions
from runtime.frames import Frame, Picture
from runtime.vision import VisualTokens


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
class Arrival:
    """A frame and when the loop received it.

    Attributes:
        frame: the picture.
        index: frames received before it.
        at_s: monotonic seconds.
        camera: which of several cameras it came from, counted from 0.
    """

    frame: Frame
    index: int
    at_s: float
    camera: int = 0

    def age_s(self) -> float:
        """Return how long ago the frame arrived."""
        return time.monotonic() - self.at_s


@dataclass(frozen=True, eq=False)
class Seen:
    """A frame that was encoded, or found equal to one that was.

    Attributes:
        arrival: the frame.
        visual: its visual tokens.
        encode_ms: what encoding cost; 0 where the tokens were kept.
        kept: whether the tokens are those of an earlier frame of a still scene.
        done_s: monotonic seconds when the tokens were there.
    """

    arrival: Arrival
    visual: VisualTokens
    encode_ms: float
    kept: bool
    done_s: float


class Encoder(Protocol):
    """Turns a picture into visual tokens."""

    def encode(self, image: Picture) -> VisualTokens:
        """Encode one picture; raises `EngineError` or `PictureError`."""


class BatchEncoder(Protocol):
    """Turns pictures into visual tokens, all at once."""

    def encode_batch(self, images: Sequence[Picture]) -> Sequence[VisualTokens]:
        """Encode pictures of any sizes; raises `EngineError` or `PictureError`."""


@dataclass(frozen=True)
class Said:
    """What the language model answered.

    Attributes:
        text: the answer.
        token_ids: its tokens.
        finish: why it ended.
        prompt_tokens: positions of the prompt, visual tokens included.
        prefill_ms: time until the first logits.
        decode_ms: time from there to the end.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: str
    prompt_tokens: int
    prefill_ms: float
    decode_ms: float


class Answerer(Protocol):
    """Answers a question about visual tokens."""

    def answer(
        self,
        visual: VisualTokens,
        question: str,
        prefilled: Callable[[], None],
        interrupted: Callable[[], bool],
    ) -> Said:
        """Answer; call ``prefilled`` before decoding, and end early once ``interrupted``.

        Raises:
            BackendError: the language model failed; it can be asked again.
            OptionError: the question cannot be asked.
        """


@dataclass(frozen=True, eq=False)
class CameraAnswer:
    """An answer about one frame.

    Attributes:
        seen: the frame and its tokens.
        question: what was asked.
        said: the answer; of a still scene, the one given before.
        age_ms: age of the frame when the first token was there.
        reused: nothing was computed: the scene and the question are those of the last answer.
    """

    seen: Seen
    question: str
    said: Said
    age_ms: float
    reused: bool


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
