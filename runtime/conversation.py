"""A conversation about images over one loaded model.

The whole conversation is the prompt each time, and `Context` computes only what the KV cache does
not hold: a follow-up question costs its own tokens, and a new frame in the place of the last costs
the frame and the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from runtime.language.generate import GenerationOptions
from runtime.language.parts import Picture, PlacedTokens
from runtime.language.prompt import Turn
from runtime.model import Answer, Model, Show
from runtime.vision import Pixels, VisualTokens
from runtime.vision.visual_tokens import Shown

_LARGEST_RESERVE = 0.25
"""Share of the context that is kept free for an answer, at most."""


@dataclass(frozen=True)
class ShownImage:
    """An image as the language model saw it.

    Attributes:
        name: what the user calls it, a path for example.
        tokens: as `Model.picture_of` returns them.
        pixels: uint8[H, W, 3], kept where it would be seen in another way among others; None: it
            would not, or is seen so already, or comes from a file that does not hold it.
    """

    name: str
    tokens: Picture
    pixels: Pixels | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        question: the words.
        images: shown with it, before the words.
        answer: None while it is being written.
    """

    question: str
    images: tuple[ShownImage, ...] = ()
    answer: str | None = None


class Conversation:
    """Images, questions and answers over one loaded model.

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
        self._shown: list[ShownImage] = []  # waiting for the next question
        self._seen: list[VisualTokens] = []  # how those of them that are new were seen

    @property
    def images(self) -> tuple[ShownImage, ...]:
        """Every image the next prompt holds, oldest first."""
        said = [image for exchange in self.exchanges for image in exchange.images]
        return (*said, *self._shown)

    def show(self, image: Pixels, name: str = "picture") -> VisualTokens:
        """Put one more image before the next question.

        A checkpoint that sees each of several pictures in another way (LLaVA-OneVision, as one
        square) is from now on shown the earlier one so, too.

        Args:
            image: RGB, uint8[H, W, 3].
            name: what to call it.
        """
        shown, visual = self._look(image, name, among_others=bool(self.images))
        self._show_among_others()
        self._shown.append(shown)
        self._seen.append(visual)
        return visual

    def replace_image(self, image: Pixels, name: str = "frame") -> VisualTokens:
        """Put a new frame in the place of the last image.

        What was said since that image was shown is forgotten: it is no longer true.

        Args:
            image: RGB, uint8[H, W, 3].
            name: what to call it.
        """
        shown, visual = self._look(image, name, among_others=len(self.images) > 1)
        if not self._shown:
            with_images = [at for at, said in enumerate(self.exchanges) if said.images]
            if with_images:
                self._shown = list(self.exchanges[with_images[-1]].images)
                del self.exchanges[with_images[-1] :]
        self._shown[-1:] = [shown]
        self._seen[-1:] = [visual]
        return visual

    def _look(
        self, image: Pixels, name: str, among_others: bool
    ) -> tuple[ShownImage, VisualTokens]:
        """Return an image as it is shown, alone or among others."""
        differs = self.model.bundle.squares_of_several
        shown: Shown = "among_others" if differs and among_others else "alone"
        visual = self.model.encoder.encode([image], shown)
        pixels = image if differs and shown == "alone" else None
        return ShownImage(name, self.model.picture_of(visual), pixels), visual

    def _show_among_others(self) -> None:
        """Look again at what was seen alone, because another image comes."""
        for at, said in enumerate(self.exchanges):
            images = tuple(self._again(image)[0] for image in said.images)
            self.exchanges[at] = replace(said, images=images)
        for back in range(1, len(self._shown) + 1):
            self._shown[-back], visual = self._again(self._shown[-back])
            if visual is not None and back <= len(self._seen):
                self._seen[-back] = visual

    def _again(self, image: ShownImage) -> tuple[ShownImage, VisualTokens | None]:
        """Return an image as one among others, and how it is seen if that is another way."""
        if image.pixels is None:
            return image, None
        return self._look(image.pixels, image.name, among_others=True)

    def ask(
        self, question: str, options: GenerationOptions | None = None, show: Show | None = None
    ) -> Answer:
        """Answer the next question.

        When the context is full the oldest exchanges go; the system's words and the latest image
        stay.

        Args:
            question: the words.
            options: how the answer is written.
            show: called with each piece of the answer as it is written.

        Raises:
            OptionError: the chat template refuses the conversation.
            BackendError: the question alone is more than the context holds.
        """
        chosen = self.model.limited(options)
        before = self.exchanges, self._shown, self.dropped
        self.exchanges = [*self.exchanges, Exchange(question, tuple(self._shown))]
        self._shown = []
        try:
            self._make_room(chosen.most_tokens)
            images = [image.tokens for image in self.images]
            answer = self.model.answer(self._turns(), images, chosen, show)
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
        trained = self.model.bundle.manifest.text.context_length
        reserve = min(max_tokens, int(context_length * _LARGEST_RESERVE))
        while len(self.exchanges) > 1:
            taken = self.count_positions() + reserve
            if taken <= context_length and taken + self._left_out() <= trained:
                return
            self._drop_oldest()

    def count_positions(self) -> int:
        """Return how much of the context the conversation takes, up to where the model answers."""
        visual = sum(len(image.tokens) - 1 for image in self.images)
        return len(self.model.writer.ids(self._turns())) + visual

    def _left_out(self) -> int:
        """Return how many positions of pictures have no token."""
        placed = [image.tokens for image in self.images if isinstance(image.tokens, PlacedTokens)]
        return sum(picture.length - len(picture) for picture in placed)

    def _drop_oldest(self) -> None:
        oldest = self.exchanges.pop(0)
        self.dropped += 1
        if oldest.images and not self.images:  # the latest image stays
            first = self.exchanges[0]
            self.exchanges[0] = replace(first, images=oldest.images[-1:])

    def _turns(self) -> Sequence[Turn]:
        turns = [Turn("system", self.system)] if self.system else []
        for exchange in self.exchanges:
            turns.append(Turn("user", exchange.question, images=len(exchange.images)))
            if exchange.answer is not None:
                turns.append(Turn("assistant", exchange.answer))
        return turns
