"""Write answers in threads, and hand their pieces to the event loop as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engines.bundle import Bundle
from engines.errors import FoveateError
from runtime.language.generate import GenerationOptions
from runtime.language.parts import Picture
from runtime.language.prompt import PromptWriter, Turn, interleave
from runtime.model import Answer, Model
from runtime.server.caches import Caches
from runtime.server.refusals import RefusalError, refusal_of
from runtime.server.ticket import Ticket
from runtime.vision.encoder import VisionEncoder


@dataclass(frozen=True)
class Prefilled:
    """The prompt was read, and the answer begins."""


Item = Prefilled | str | Answer | BaseException
"""What a thread tells of an answer: that it begins, its pieces, and how it ended."""


class AnsweringThreads:
    """Writes so many answers at once.

    Attributes:
        caches: whose KV cache each of them uses.
    """

    def __init__(
        self,
        bundle: Bundle,
        encoder: VisionEncoder,
        writer: PromptWriter,
        caches: Caches,
        parallel: int,
    ) -> None:
        self.caches = caches
        self._bundle, self._encoder, self._writer = bundle, encoder, writer
        self._threads = ThreadPoolExecutor(parallel, "answering")

    async def answer(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Picture],
        options: GenerationOptions,
        ticket: Ticket,
        fresh: bool = False,
    ) -> AsyncIterator[Item]:
        """Yield `Prefilled`, the pieces of the answer and, last, the answer.

        Args:
            turns: the conversation.
            pictures: the visual tokens of each in it.
            options: how the answer is written.
            ticket: once it is over, writing stops.
            fresh: read the whole prompt, whatever a KV cache holds of it.

        Raises:
            RefusalError: the answer cannot be written, or its deadline passed.
        """
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Item] = asyncio.Queue()

        def tell(item: Item) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(items.put_nowait, item)

        working = loop.run_in_executor(
            self._threads, self._write, turns, pictures, options, ticket, fresh, tell
        )
        try:
            while True:
                item = await _next(items, ticket)
                if isinstance(item, FoveateError):
                    raise refusal_of(item) from item
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Answer):
                    return
        finally:
            ticket.give_up()
            working.cancel()  # if it has not begun

    def _write(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Picture],
        options: GenerationOptions,
        ticket: Ticket,
        fresh: bool,
        tell: Callable[[Item], None],
    ) -> None:
        try:
            ticket.require_time()
            ids = self._writer.ids(turns)
            prompt = interleave(ids, self._writer.image_token_id, pictures)
            with self.caches.lend(prompt, fresh) as language:
                model = Model(self._bundle, self._encoder, self._writer, language)
                answer = model.answer(
                    turns,
                    pictures,
                    options,
                    tell,
                    prefilled=lambda: tell(Prefilled()),
                    interrupted=ticket.over,
                )
            tell(_checked(answer, ticket))
        except BaseException as error:  # whoever waits must hear of it, whatever it is
            tell(error)

    def close(self) -> None:
        """Let answers end and free the language model."""
        self._threads.shutdown(cancel_futures=True)
        self.caches.close()


async def _next(items: asyncio.Queue[Item], ticket: Ticket) -> Item:
    try:
        return await asyncio.wait_for(items.get(), max(ticket.left_s, 0.001))
    except asyncio.TimeoutError:
        raise ticket.deadline_passed() from None


def _checked(answer: Answer, ticket: Ticket) -> Answer:
    """Return an answer that ended well.

    Raises:
        RefusalError: it did not keep to the form it must have, or its deadline passed.
    """
    if answer.finish == "broken_form":
        raise RefusalError(
            422,
            "The model's vocabulary cannot go on with an answer of the form asked for. Ask again "
            "in other words, or for another form.",
            "form_not_kept",
            "response_format",
        )
    if answer.finish == "interrupted":
        raise ticket.deadline_passed()
    return answer
