"""A vLLM server as the language backend: visual tokens go out, text comes back.

Enters: a conversation and the visual tokens of its pictures. Leaves: the answer, piece by piece.
Only the visual tokens travel, as `prompt_embeds` parts of a Chat Completions request in half
precision; the server tokenizes the words and applies the chat template, which must be the bundle's.
Start it with `vllm serve MODEL --enable-prompt-embeds --chat-template-content-format openai`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, ClassVar

from engines.bundle import Bundle
from engines.errors import BackendError
from runtime.backends import Capabilities
from runtime.backends.chat_server import ChatServer, ServerOptions
from runtime.backends.rows import require_room
from runtime.backends.served_prompt import ServedPrompt
from runtime.backends.tensor_payload import payload_from_rows
from runtime.generate import Finish, GenerationOptions
from runtime.parts import Embeddings
from runtime.prompt import PromptWriter, Turn


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
    capabilities: ClassVar[Capabilities] = Capabilities(logits=False, rewind=False, fork=False)

    def __init__(self, server: ChatServer, bundle: Bundle, model: str, context_length: int) -> None:
        self.hidden_size = bundle.manifest.text.hidden_size
        self.context_length = context_length
        self.model = model
        self._server = server
        self._writer = PromptWriter(bundle)
        self._prompt = ServedPrompt(self._writer, bundle.manifest.prompt)

    def generate(
        self, turns: Sequence[Turn], pictures: Sequence[Embeddings], options: GenerationOptions
    ) -> VllmGeneration:
        """Start an answer to a conversation; nothing is sent until it is iterated over.

        Args:
            turns: the conversation.
            pictures: float32[N, D] of each picture, in the order of the turns.
            options: how the answer is written.

        Raises:
            BackendError: a picture that must not be sent, or more positions than the context holds.
            OptionError: a conversation that the server would read differently.
        """
        payloads = [payload_from_rows(picture, self.hidden_size) for picture in pictures]
        prompt = self._writer.parts(turns, pictures)
        require_room(0, sum(len(part) for part in prompt) + 1, self.context_length)
        sampling = options.sampling
        request = {
            "model": self.model,
            "messages": self._prompt.messages(turns, payloads),
            "add_special_tokens": self._prompt.adds_special_tokens(turns),
            "max_tokens": options.max_tokens,
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
        return VllmGeneration(self._server.stream(request), self._writer, options)

    def close(self) -> None:
        """Let go of the server; there is nothing to free."""


class VllmGeneration:
    """One answer that the server writes; see `TextGeneration`.

    Attributes:
        token_ids: tokens of the answer so far, without the stop token.
        text: the answer so far.
        finish: why it ended; None while it has not.
        prompt_tokens: positions of the prompt as the server counted them; 0 until it has ended.
    """

    def __init__(
        self,
        events: Generator[dict[str, Any]],
        writer: PromptWriter,
        options: GenerationOptions,
    ) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self.prompt_tokens = 0
        self._events = events
        self._tokenizer = writer.tokenizer
        self._stop_token_ids = frozenset(writer.stop_token_ids)
        self._options = options

    def __iter__(self) -> Iterator[str]:
        """Yield the answer's pieces as they come; leaving early cancels it on the server.

        Raises:
            BackendError: the server cannot answer, or broke off.
        """
        with closing(self._events):
            for event in self._events:
                self.prompt_tokens = (event.get("usage") or {}).get("prompt_tokens", 0)
                for choice in event.get("choices", ()):
                    self.token_ids += choice.get("token_ids") or []
                    piece = self._read_piece((choice.get("delta") or {}).get("content") or "")
                    if choice.get("finish_reason"):
                        self.finish = self._read_finish(choice)
                    if piece:
                        self.text += piece
                        yield piece
        if self.finish is None:
            raise BackendError(
                "The server ended an answer without saying why it stopped. Expected a "
                "finish_reason, as vLLM sends; look at what serves this address."
            )

    def _read_piece(self, content: str) -> str:
        """Return what a piece adds to the answer as our own decoding would give it.

        A server decodes the answer as the prompt's continuation, so it keeps the space between the
        two, which tokenizers of SentencePiece's kind leave out at the beginning of a text.
        """
        first = not self.text and content.startswith(" ")
        if first and not self._tokenizer.decode(self.token_ids).startswith(" "):
            return content[1:]
        return content

    def _read_finish(self, choice: dict[str, Any]) -> Finish:
        if self.token_ids and self.token_ids[-1] in self._stop_token_ids:
            self.token_ids.pop()
        if choice["finish_reason"] == "length":
            full = len(self.token_ids) < self._options.max_tokens
            return "context_full" if full else "max_tokens"
        return "stop_string" if isinstance(choice.get("stop_reason"), str) else "stop_token"


def open_vllm_backend(
    bundle: Bundle, options: ServerOptions, *, model: str | None = None
) -> VllmBackend:
    """Ask a server what it serves and make ready to ask it more.

    Args:
        bundle: an opened bundle of the checkpoint whose language model the server has.
        options: how to reach the server.
        model: the server's name for the language model; left out, the only one it has.

    Raises:
        BackendError: no server, no such model, or several to choose from.
    """
    server = ChatServer(options)
    served = {str(entry.get("id")): entry for entry in server.models()}
    if model is None and len(served) == 1:
        model = next(iter(served))
    if model not in served:
        asked = "which one was not said" if model is None else f"and none is {model!r}"
        raise BackendError(
            f"{options.url} serves {', '.join(served) or 'no model'}, {asked}. Name one of its "
            "models with --llm-model."
        )
    trained = bundle.manifest.text.context_length
    length = served[model].get("max_model_len")
    return VllmBackend(
        server, bundle, model, min(length, trained) if isinstance(length, int) else trained
    )
