"""Ask a vLLM server: visual tokens go out, text comes back.

Only the visual tokens travel, as `prompt_embeds` parts of a Chat Completions request in half
precision. The server tokenizes the words and applies the chat template, which must be the bundle's.
`export.served_model` writes the model and says how to serve it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any, ClassVar

from pydantic_core import from_json

from engines.bundle import Bundle
from engines.errors import BackendError
from runtime.backends import Capabilities
from runtime.backends.chat_events import Choice, Event, Usage, shown
from runtime.backends.chat_server import ChatServer, ServerOptions
from runtime.backends.rows import require_room
from runtime.backends.served_prompt import ServedPrompt
from runtime.backends.tensor_payload import payload_from_rows
from runtime.language.answer_form import require_usable
from runtime.language.generate import Finish, GenerationOptions, finish_of_answer
from runtime.language.grammar import Grammar
from runtime.language.parts import Embeddings
from runtime.language.prompt import PromptWriter, Turn

_OTHER_EVENTS = 16
"""Events of an answer that hold no token: its beginning, its end, what it took."""


class VllmBackend:
    """A conversation partner behind Chat Completions; see `TextBackend`.

    The server keeps nothing of a conversation but its prefix cache: every question sends all of it,
    and an answer that breaks off leaves it unchanged.

    Attributes:
        hidden_size: D of the embeddings it takes.
        context_length: positions of prompt and answer together.
        model: the server's name for the language model.
    """

    name = "vllm"
    capabilities: ClassVar[Capabilities] = Capabilities(
        logits=False, rewind=False, fork=False, apart=True
    )

    def __init__(
        self,
        server: ChatServer,
        bundle: Bundle,
        model: str,
        context_length: int,
        writer: PromptWriter | None = None,
    ) -> None:
        self.hidden_size = bundle.manifest.text.hidden_size
        self.context_length = context_length
        self.model = model
        self._server = server
        self._writer = writer or PromptWriter(bundle)
        self._prompt = ServedPrompt(self._writer, bundle.manifest.prompt)

    def generate(
        self, turns: Sequence[Turn], pictures: Sequence[Embeddings], options: GenerationOptions
    ) -> VllmGeneration:
        """Start an answer to a conversation; nothing is sent until it is waited for.

        Args:
            turns: the conversation.
            pictures: float32[N, D] of each picture, in the order of the turns.
            options: how the answer is written.

        Raises:
            BackendError: a picture that must not be sent, or more positions than the context holds.
            OptionError: a conversation that the server would read differently, or a form of the
                answer that cannot be used.
        """
        if options.grammar is not None:
            require_usable(options.grammar)
        payloads = [payload_from_rows(picture, self.hidden_size) for picture in pictures]
        prompt = sum(len(part) for part in self._writer.parts(turns, pictures))
        require_room(0, prompt + 1, self.context_length)
        sampling = options.sampling
        request = {
            "model": self.model,
            "messages": self._prompt.messages(turns, payloads),
            "add_special_tokens": self._prompt.adds_special_tokens(turns),
            "max_tokens": options.most_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
            "stop": list(options.stop),
            "stop_token_ids": list(self._writer.stop_token_ids),
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        if options.grammar is not None:
            request["structured_outputs"] = _structure_from_grammar(options.grammar)
        return VllmGeneration(self._server.stream(request), self._writer, options, prompt)

    def close(self) -> None:
        """Let go of the server; there is nothing to free."""


class VllmGeneration:
    """One answer that the server writes; see `TextGeneration`.

    Attributes:
        token_ids: tokens of the answer so far, without the stop token.
        text: the answer so far.
        finish: why it ended; None while it has not.
        prompt_tokens: positions of the prompt; once it has ended, as the server counted them.
        reused_tokens: how many of them were in the server's prefix cache, where it says so
            (`--enable-prompt-tokens-details`).
    """

    def __init__(
        self,
        events: Generator[Event],
        writer: PromptWriter,
        options: GenerationOptions,
        prompt_tokens: int,
    ) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self.prompt_tokens = prompt_tokens
        self.reused_tokens: int | None = None
        self._events = events
        self._first: list[Event] = []
        self._read = self._pieces = 0
        self._tokenizer = writer.tokenizer
        self._stop_token_ids = frozenset(writer.stop_token_ids)
        self._options = options

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
                    self.token_ids += choice.token_ids or ()
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
                "finish_reason, as vLLM sends; look at what serves this address."
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
        written = max(len(self.token_ids), self._pieces)
        if written > most + 1 or self._read > 2 * most + _OTHER_EVENTS:
            raise BackendError(
                f"The server was asked for {most} tokens at most and sent {written} in "
                f"{self._read} events. It ignores max_tokens; look at what serves this address."
            )

    def _read_piece(self, content: str) -> str:
        """Return what a piece adds to the answer as our own decoding would give it.

        A server decodes the answer as the prompt's continuation, so it keeps the space between the
        two, which tokenizers of SentencePiece's kind leave out at the beginning of a text.
        """
        if self._options.grammar is not None and not self.text:
            return content.lstrip()
        first = not self.text and content.startswith(" ")
        if first and not self._tokenizer.decode(self.token_ids).startswith(" "):
            return content[1:]
        return content

    def _read_finish(self, choice: Choice) -> Finish:
        if self.token_ids and self.token_ids[-1] in self._stop_token_ids:
            self.token_ids.pop()
        if choice.finish_reason == "length":
            full = len(self.token_ids) < self._options.most_tokens
            return "context_full" if full else "max_tokens"
        return "stop_string" if isinstance(choice.stop_reason, str) else "stop_token"


def _structure_from_grammar(grammar: Grammar) -> dict[str, Any]:
    """Return the form of an answer, known to be usable, as vLLM's structured outputs take it."""
    if grammar.json_schema is None:
        return {"regex": grammar.regex}
    return {"json": from_json(grammar.json_schema)}


def open_vllm_backend(
    bundle: Bundle, options: ServerOptions, writer: PromptWriter | None = None
) -> VllmBackend:
    """Ask a server what it serves and make ready to ask it more.

    Args:
        bundle: an opened bundle of the checkpoint whose language model the server has.
        options: how to reach the server.
        writer: writes the bundle's prompts, where there is one already.

    Raises:
        BackendError: no server, no such model, or several to choose from.
    """
    server, model = ChatServer(options), options.model
    served = {entry.id: entry for entry in server.models()}
    if model is None and len(served) == 1:
        model = next(iter(served))
    if model not in served:
        asked = "which one was not said" if model is None else f"and none is {model!r}"
        names = shown(", ".join(served)) or "no model"
        raise BackendError(
            f"{options.url} serves {names}, {asked}. Name one of its models with --llm-model."
        )
    trained = bundle.manifest.text.context_length
    length = served[model].max_model_len
    return VllmBackend(server, bundle, model, min(length or trained, trained), writer)
