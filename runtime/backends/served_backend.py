"""What the language models behind a chat server have in common, whoever serves them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from engines.bundle import Bundle
from runtime.backends import Capabilities
from runtime.backends.chat_server import ChatServer
from runtime.backends.rows import require_room
from runtime.backends.served_generation import ServedGeneration
from runtime.backends.tensor_payload import payload_from_picture
from runtime.language.answer_form import require_usable
from runtime.language.generate import GenerationOptions
from runtime.language.parts import Picture
from runtime.language.prompt import PromptWriter, Turn


class ServedBackend(ABC):
    """A conversation partner behind Chat Completions; see `TextBackend`.

    Every question sends the whole conversation, and an answer that breaks off leaves the server
    unchanged.

    Attributes:
        hidden_size: D of the embeddings it takes.
        context_length: positions of prompt and answer together.
        model: the server's name for the language model.
    """

    name: str
    capabilities: ClassVar[Capabilities] = Capabilities(
        logits=False, rewind=False, fork=False, apart=True, positions=False, bias=False
    )
    generation: ClassVar[type[ServedGeneration]] = ServedGeneration

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

    def generate(
        self, turns: Sequence[Turn], pictures: Sequence[Picture], options: GenerationOptions
    ) -> ServedGeneration:
        """Start an answer to a conversation; nothing is sent until it is waited for.

        Args:
            turns: the conversation.
            pictures: the visual tokens of each, in the order of the turns.
            options: how the answer is written.

        Raises:
            BackendError: a picture that must not be sent, or more positions than the context holds.
            OptionError: a conversation that the server would read differently, or a form of the
                answer that cannot be used.
        """
        if options.grammar is not None:
            require_usable(options.grammar)
        payloads = [payload_from_picture(picture, self.hidden_size) for picture in pictures]
        prompt = sum(len(part) for part in self._writer.parts(turns, pictures))
        require_room(0, prompt + 1, self.context_length)
        sampling = options.sampling
        request = {
            "model": self.model,
            "max_tokens": options.most_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
            "stop": list(options.stop),
            "stop_token_ids": list(self._writer.stop_token_ids),
            **self._asked(turns, payloads, options),
        }
        return self.generation(self._server.stream(request), self._writer, options, prompt)

    @abstractmethod
    def _asked(
        self, turns: Sequence[Turn], payloads: Sequence[str], options: GenerationOptions
    ) -> dict[str, Any]:
        """Return the fields of a request that this server has in its own form.

        Args:
            turns: the conversation.
            payloads: its pictures, as text.
            options: how the answer is written; a grammar is known to be usable.

        Raises:
            OptionError: a conversation that the server would read differently.
        """

    def close(self) -> None:  # noqa: B027 - a whole implementation, not a place for one
        """Let go of the server; there is nothing to free."""
