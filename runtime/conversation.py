"""A conversation about pictures that does not start over with every question.

Enters: pictures and questions, one after the other. Leaves: answers. The whole conversation is the
prompt each time, and `Context` computes only what the KV cache does not hold: a follow-up question
costs its own tokens, and a new frame in the place of the last costs the frame and the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.language.generate import GenerationOptions
from runtime.language.parts import Embeddings
from runtime.language.prompt import Turn
from runtime.model import Answer, Model, Show
from runtime.vision import VisualTokens

Pixels = NDArray[np.uint8]

_LARGEST_RESERVE = 0.25
"""Share of the context that is kept free for an answer, at most."""


@dataclass(frozen=True)
class Picture:
    """A picture as the language model saw it.

    Attributes:
        name: what the user calls it, a path for example.
        tokens: float32[N, D].
    """

    name: str
    tokens: Embeddings


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        question: the words.
        pictures: shown with it, before the words.
        answer: None while it is being written.
    """

    question: str
    pictures: tuple[Picture, ...] = ()
    answer: str | None = None


class Conversation:
    """Pictures, questions and answers over one loaded model.

    Attributes:
        model: answers; another conversation over it costs recomputing this one.
        system: instructions before the conversation; not every checkpoint takes them.
        exchanges: what was said, oldest first.
        dropped: how many exchanges had to go because the context was full.
    """

    def __init__(self, model: Model, system: str | None = None) -> None:
        self.model = model
        self.system = system
        self.exchanges: list[Exchange] = []
        self.dropped = 0
        self._shown: list[Picture] = []  # waiting for the next question
        self._seen: list[VisualTokens] = []  # how those of them that are new were seen

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Every picture the next prompt holds, oldest first."""
        said = [picture for exchange in self.exchanges for picture in exchange.pictures]
        return (*said, *self._shown)

    def show(self, pixels: Pixels, name: str = "picture") -> VisualTokens:
        """Put one more picture before the next question.

        Args:
            pixels: RGB, uint8[H, W, 3].
            name: what to call it.
        """
        visual = self.model.encoder.encode([pixels])
        self._shown.append(Picture(name, visual.picture(0)))
        self._seen.append(visual)
        return visual

    def replace_picture(self, pixels: Pixels, name: str = "frame") -> VisualTokens:
        """Put a new frame in the place of the last picture.

        What was said since that picture was shown is forgotten: it is no longer true.

        Args:
            pixels: RGB, uint8[H, W, 3].
            name: what to call it.
        """
        visual = self.model.encoder.encode([pixels])
        if not self._shown:
            with_pictures = [at for at, said in enumerate(self.exchanges) if said.pictures]
            if with_pictures:
                self._shown = list(self.exchanges[with_pictures[-1]].pictures)
                del self.exchanges[with_pictures[-1] :]
        self._shown[-1:] = [Picture(name, visual.picture(0))]
        self._seen[-1:] = [visual]
        return visual

    def ask(
        self, question: str, options: GenerationOptions | None = None, show: Show | None = None
    ) -> Answer:
        """Answer the next question.

        When the context is full the oldest exchanges go; the system's words and the latest picture
        stay.

        Args:
            question: the words.
            options: how the answer is written.
            show: called with each piece of the answer as it is written.

        Raises:
            OptionError: the chat template refuses the conversation.
            BackendError: the question alone is more than the context holds.
        """
        chosen = options or GenerationOptions()
        before = self.exchanges, self._shown, self.dropped
        self.exchanges = [*self.exchanges, Exchange(question, tuple(self._shown))]
        self._shown = []
        try:
            self._make_room(chosen.max_tokens)
            pictures = [picture.tokens for picture in self.pictures]
            answer = self.model.answer(self._turns(), pictures, chosen, show)
        except BaseException:
            self.exchanges, self._shown, self.dropped = before
            raise
        self.exchanges[-1] = replace(self.exchanges[-1], answer=answer.text)
        seen, self._seen = self._seen, []
        return answer.with_seen(seen)

    def reset(self) -> None:
        """Forget everything but the system's words."""
        self.exchanges = []
        self._shown = []
        self._seen = []
        self.dropped = 0

    def _make_room(self, max_tokens: int) -> None:
        """Drop the oldest exchanges until prompt and answer fit."""
        context_length = self.model.language.context_length
        reserve = min(max_tokens, int(context_length * _LARGEST_RESERVE))
        while len(self.exchanges) > 1 and self.count_positions() + reserve > context_length:
            self._drop_oldest()

    def count_positions(self) -> int:
        """Return how many positions the conversation takes, with what makes the model answer."""
        visual = sum(len(picture.tokens) - 1 for picture in self.pictures)
        return len(self.model.writer.ids(self._turns())) + visual

    def _drop_oldest(self) -> None:
        oldest = self.exchanges.pop(0)
        self.dropped += 1
        if oldest.pictures and not self.pictures:  # the latest picture stays
            first = self.exchanges[0]
            self.exchanges[0] = replace(first, pictures=oldest.pictures[-1:])

    def _turns(self) -> Sequence[Turn]:
        turns = [Turn("system", self.system)] if self.system else []
        for exchange in self.exchanges:
            turns.append(Turn("user", exchange.question, images=len(exchange.pictures)))
            if exchange.answer is not None:
                turns.append(Turn("assistant", exchange.answer))
        return turns
