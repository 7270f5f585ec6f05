"""One answer that a chat server writes: its events become pieces of text, checked as they come."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from itertools import chain, islice

from engines.errors import BackendError
from runtime.backends.chat_events import Choice, Event, Usage
from runtime.language.generate import Finish, GenerationOptions, finish_of_answer
from runtime.language.prompt import PromptWriter

_OTHER_EVENTS = 16
"""Events of an answer that hold no token: its beginning, its end, what it took."""


class ServedGeneration:
    """One answer that the server writes; see `TextGeneration`.

    Attributes:
        text: the answer so far.
        finish: why it ended; None while it has not.
        prompt_tokens: positions of the prompt; once it has ended, as the server counted them.
        reused_tokens: how many of them were in the server's prefix cache, where it says so.
    """

    def __init__(
        self,
        events: Generator[Event],
        writer: PromptWriter,
        options: GenerationOptions,
        prompt_tokens: int,
    ) -> None:
        self.text = ""
        self.finish: Finish | None = None
        self.prompt_tokens = prompt_tokens
        self.reused_tokens: int | None = None
        self._events = events
        self._first: list[Event] = []
        self._ids: list[int] = []
        self._read = self._pieces = 0
        self._tokenizer = writer.tokenizer
        self._stop_token_ids = frozenset(writer.stop_token_ids)
        self._options = options

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the answer so far, without the stop token."""
        return self._ids

    def prefill(self) -> None:
        """Send the question and wait for the first piece of the answer.

        Raises:
            BackendError: the server cannot answer.
        """
        if not self._first:
            self._first = list(islice(self._events, 1))

    def __iter__(self) -> Generator[str]:
        """Yield the answer's pieces as they come; leaving early cancels it on the server.

        Raises:
            BackendError: the server cannot answer, broke off, or does not keep to what was asked.
        """
        reason: Finish | None = None
        with closing(self._events):
            self.prefill()
            for event in chain(self._first, self._events):
                if event.usage is not None:
                    self._read_usage(event.usage)
                for choice in event.choices:
                    self._ids += choice.token_ids or ()
                    content = (choice.delta.content if choice.delta else None) or ""
                    self._pieces += bool(content)
                    piece = self._read_piece(content)
                    if choice.finish_reason:
                        reason = self._read_finish(choice)
                    if piece:
                        self.text += piece
                        yield piece
                self._require_measure()
        if reason is None:
            raise BackendError(
                "The server ended an answer without saying why it stopped. Expected a "
                "finish_reason, as vLLM and TensorRT-LLM send; look at what serves this address."
            )
        self.finish = finish_of_answer(reason, self.text, self._options.grammar)

    def _read_usage(self, usage: Usage) -> None:
        if usage.prompt_tokens is not None:
            self.prompt_tokens = usage.prompt_tokens
        details = usage.prompt_tokens_details
        if details is not None and details.cached_tokens is not None:
            self.reused_tokens = details.cached_tokens

    def _require_measure(self) -> None:
        """Check that no more came than was asked for."""
        most = self._options.most_tokens
        self._read += 1
        written = max(self._written(), self._pieces)
        if written > most + 1 or self._read > 2 * most + _OTHER_EVENTS:
            raise BackendError(
                f"The server was asked for {most} tokens at most and sent {written} in "
                f"{self._read} events. It ignores max_tokens; look at what serves this address."
            )

    def _written(self) -> int:
        """Return how many tokens the server has written."""
        return len(self._ids)

    def _read_piece(self, content: str) -> str:
        """Return what a piece adds to the answer as our own decoding would give it.

        A server decodes the answer as the prompt's continuation, so it keeps the space between the
        two, which tokenizers of SentencePiece's kind leave out at the beginning of a text.
        """
        if self._options.grammar is not None and not self.text:
            return content.lstrip()
        first = not self.text and content.startswith(" ")
        return content[1:] if first and not self._begins_with_space() else content

    def _begins_with_space(self) -> bool:
        """Return whether our own decoding of the answer begins with a space."""
        return self._tokenizer.decode(self._ids).startswith(" ")

    def _read_finish(self, choice: Choice) -> Finish:
        if self._ids and self._ids[-1] in self._stop_token_ids:
            self._ids.pop()
        if choice.finish_reason == "length":
            full = self._written() < self._options.most_tokens
            return "context_full" if full else "max_tokens"
        return "stop_string" if isinstance(choice.stop_reason, str) else "stop_token"
