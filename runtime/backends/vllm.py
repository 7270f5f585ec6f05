"""Ask a vLLM server: visual tokens go out, text comes back.

Only the visual tokens travel, as `prompt_embeds` parts of a Chat Completions request in half
precision. The server tokenizes the words and applies the chat template, which must be the bundle's.
`export.served_model` writes the model and says how to serve it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from engines.bundle import Bundle
from runtime.backends.chat_server import ChatServer, ServerOptions, choose_model
from runtime.backends.served_backend import ServedBackend
from runtime.backends.served_prompt import ServedPrompt
from runtime.language.generate import GenerationOptions
from runtime.language.grammar import Grammar
from runtime.language.prompt import PromptWriter, Turn


class VllmBackend(ServedBackend):
    """A conversation partner behind vLLM, which keeps nothing but its prefix cache."""

    name = "vllm"

    def __init__(
        self,
        server: ChatServer,
        bundle: Bundle,
        model: str,
        context_length: int,
        writer: PromptWriter | None = None,
    ) -> None:
        super().__init__(server, bundle, model, context_length, writer)
        self._prompt = ServedPrompt(self._writer, bundle.manifest.prompt)

    def _asked(
        self, turns: Sequence[Turn], payloads: Sequence[str], options: GenerationOptions
    ) -> dict[str, Any]:
        fields = {
            "messages": self._prompt.messages(turns, payloads),
            "add_special_tokens": self._prompt.adds_special_tokens(turns),
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        if options.grammar is not None:
            fields["structured_outputs"] = _structure_from_grammar(options.grammar)
        return fields


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
