"""Ask a vLLM server: visual tokens go out, text comes back.

Only the visual tokens travel, as `prompt_embeds` parts of a Chat Completions request in half
precision. The server tokenizes the words and applies the chat template, which must be the bundle's.
`export.served_model` writes the model and says how to serve it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic_core import from_json

from engines.bundle import Bundle
from runtime.backends import Capabilities
from runtime.backends.chat_server import ChatServer, ServerOptions, choose_model
from runtime.backends.rows import require_room
from runtime.backends.served_generation import ServedGeneration
from runtime.backends.served_prompt import ServedPrompt
from runtime.backends.tensor_payload import payload_from_picture
from runtime.language.answer_form import require_usable
from runtime.language.generate import GenerationOptions
from runtime.language.grammar import Grammar
from runtime.language.parts import Picture
from runtime.language.prompt import PromptWriter, Turn


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
        logits=False, rewind=False, fork=False, apart=True, positions=False, bias=False
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
        return ServedGeneration(self._server.stream(request), self._writer, options, prompt)

    def close(self) -> None:
        """Let go of the server; there is nothing to free."""


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
    server = ChatServer(options)
    served = choose_model(server)
    trained = bundle.manifest.text.context_length
    length = min(served.max_model_len or trained, trained)
    return VllmBackend(server, bundle, served.id, length, writer)
