"""Ask a TensorRT-LLM server (`trtllm-serve`): visual tokens go out, text comes back.

The visual tokens travel as `image_embeds` parts of a Chat Completions request in half precision;
the server's input processor puts them in the places of `<image>` in the text. The robot writes the
whole prompt, since the server's chat template hands it on as it is: `export.served_model --server
trtllm` writes a model of that kind and says how to serve it.

What the server is expected to do was read in TensorRT-LLM's source; docs/nvidia_llm.md names the
files and says what has run.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Sequence
from typing import Any

from pydantic_core import from_json

from engines.bundle import Bundle
from engines.errors import BackendError
from runtime.backends.chat_events import Event, Usage
from runtime.backends.chat_server import ChatServer, ServerOptions, choose_model
from runtime.backends.served_backend import ServedBackend
from runtime.backends.served_generation import ServedGeneration
from runtime.backends.served_text import ServedText
from runtime.language.generate import GenerationOptions
from runtime.language.grammar import Grammar
from runtime.language.prompt import PromptWriter, Turn

_SALT_BYTES = 16
_WORDS = ("a", "a b")


class TrtLlmGeneration(ServedGeneration):
    """One answer of `trtllm-serve`, which sends text and counts, and no token ids.

    It says how many positions its prompt has. If they are not ours it has read another prompt,
    and the answer is not taken.
    """

    def __init__(
        self,
        events: Generator[Event],
        writer: PromptWriter,
        options: GenerationOptions,
        prompt_tokens: int,
    ) -> None:
        super().__init__(events, writer, options, prompt_tokens)
        self._expected = prompt_tokens
        self._completion_tokens = 0

    @property
    def token_ids(self) -> list[int]:
        """The answer so far as our tokenizer splits it; the server may have split it otherwise."""
        return list(self._tokenizer.encode(self.text, add_special_tokens=False).ids)

    def _read_usage(self, usage: Usage) -> None:
        super()._read_usage(usage)
        if usage.completion_tokens is not None:
            self._completion_tokens = usage.completion_tokens
        if usage.prompt_tokens not in (None, self._expected):
            raise BackendError(
                f"The server read a prompt of {usage.prompt_tokens} positions, and the bundle's "
                f"has {self._expected}: it serves another model or chat template. Serve what "
                "`python -m export.served_model --server trtllm` writes for this checkpoint."
            )

    def _written(self) -> int:
        return self._completion_tokens

    def _begins_with_space(self) -> bool:
        """Return whether this tokenizer's decoder keeps a space before the first word."""
        one, two = (self._tokenizer.encode(text, add_special_tokens=False).ids for text in _WORDS)
        return self._tokenizer.decode(two[len(one) :]).startswith(" ")


class TrtLlmBackend(ServedBackend):
    """A conversation partner behind `trtllm-serve`.

    The server gives all pictures the same token ids (those after the vocabulary), and its cache of
    prefixes is looked up by ids: another picture would be answered from the cache of the last one.
    So each question has a cache salt of its own.
    """

    name = "trtllm"
    generation = TrtLlmGeneration

    def __init__(
        self,
        server: ChatServer,
        bundle: Bundle,
        model: str,
        context_length: int,
        writer: PromptWriter | None = None,
    ) -> None:
        super().__init__(server, bundle, model, context_length, writer)
        self._text = ServedText(self._writer, bundle.manifest.prompt)

    def _asked(
        self, turns: Sequence[Turn], payloads: Sequence[str], options: GenerationOptions
    ) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": self._text.text(turns)}]
        content += [{"type": "image_embeds", "image_embeds": {"data": data}} for data in payloads]
        sampling = options.sampling
        fields: dict[str, Any] = {
            "messages": [{"role": "user", "content": content}],
            "top_k": 1 if sampling.temperature == 0 else sampling.top_k,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "cache_salt": secrets.token_hex(_SALT_BYTES),
        }
        if options.grammar is not None:
            fields["response_format"] = _format_from_grammar(options.grammar)
        return fields


def _format_from_grammar(grammar: Grammar) -> dict[str, Any]:
    """Return the form of an answer, known to be usable, as TensorRT-LLM takes it."""
    if grammar.json_schema is None:
        return {"type": "regex", "regex": grammar.regex}
    return {"type": "json", "schema": from_json(grammar.json_schema)}


def open_trtllm_backend(
    bundle: Bundle, options: ServerOptions, writer: PromptWriter | None = None
) -> TrtLlmBackend:
    """Ask a server what it serves and make ready to ask it more.

    Args:
        bundle: an opened bundle of the checkpoint whose language model the server has.
        options: how to reach the server.
        writer: writes the bundle's prompts, where there is one already.

    Raises:
        BackendError: no server, no such model, or several to choose from.
    """
    server = ChatServer(options)
    # The server does not tell its own, so it is the length that the checkpoint was trained for.
    length = bundle.manifest.text.context_length
    return TrtLlmBackend(server, bundle, choose_model(server).id, length, writer)
