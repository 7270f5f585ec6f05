"""What `trtllm-serve` does with a chat request, on the CPU and with transformers' LLaVA-NeXT.

Written from TensorRT-LLM's source (Apache-2.0), main branch of 2026 between 1.3.0rc and 1.4.0rc1:
`tensorrt_llm/serve/openai_protocol.py` (which fields a request may have),
`serve/chat_utils.py` (content parts), `inputs/utils.py` and `inputs/content_format.py` (the chat
template), `_torch/models/modeling_llava_next.py` (ids of visual tokens),
`_torch/models/modeling_multimodal_utils.py` (where they enter), `serve/postprocess_handlers.py`
(the stream). It stands in for those and proves nothing about the engine.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from chat_server_stub import Handler
from jinja2 import Environment, nodes
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration

FIELDS = {
    "messages", "prompt_token_ids", "model", "frequency_penalty", "logit_bias", "logprobs",
    "top_logprobs", "max_completion_tokens", "max_tokens", "n", "presence_penalty",
    "response_format", "seed", "stop", "stream", "stream_options", "temperature", "top_p", "tools",
    "tool_choice", "user", "reasoning_effort", "prompt_ignore_length", "best_of",
    "use_beam_search", "top_k", "top_p_min", "min_p", "repetition_penalty", "length_penalty",
    "early_stopping", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens",
    "lora_request", "echo", "add_generation_prompt", "add_special_tokens", "documents",
    "chat_template", "chat_template_kwargs", "disaggregated_params", "cache_salt",
}  # fmt: skip
"""Of a ChatCompletionRequest, which forbids others."""
FORMATS = {"text", "json", "json_schema", "json_object", "regex", "ebnf", "structural_tag"}
MODELS = {"object": "list", "data": [{"id": "llm", "object": "model", "owned_by": "tensorrt_llm"}]}


class RefusedError(Exception):
    """What the server answers with status 400."""


class StandIn:
    """One server of one directory that `export.served_model --server trtllm` wrote.

    Attributes:
        keeps_order: content parts reach the template in order (since 1.3); before, the text of a
            message came first and its pictures after it.
        reused: answers that came out of the cache of prefixes.
    """

    def __init__(self, directory: Path, keeps_order: bool = True) -> None:
        self.keeps_order = keeps_order
        self.reused = 0
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        model = LlavaNextForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        self._model = model.eval()
        self._cache: dict[tuple[str | None, tuple[int, ...]], torch.Tensor] = {}

    def __call__(self, handler: Handler) -> None:
        """Answer the newest request."""
        request = handler.server.requests[-1]
        try:
            ids, features = self._read(request)
        except RefusedError as error:
            document = {"object": "error", "message": str(error), "type": "x", "code": 400}
            handler.send_json(400, document)
            return
        handler.begin_stream()
        for event in self._events(request, ids, features):
            handler.send_event(event)
        handler.send_event("[DONE]")

    def _read(self, request: dict[str, Any]) -> tuple[list[int], torch.Tensor | None]:
        """Return the ids of the prompt and the visual tokens, [N, D]."""
        if unknown := set(request) - FIELDS:
            raise RefusedError(f"Extra inputs are not permitted: {unknown}")
        if request.get("response_format", {"type": "text"})["type"] not in FORMATS:
            raise RefusedError("response_format.type")
        conversation, pictures = [], []
        for message in request["messages"]:
            content, embeddings = self._content(message["content"])
            conversation.append({"role": message["role"], "content": content})
            pictures += embeddings
        prompt = self._tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        ids = self._tokenizer(prompt).input_ids
        return self._with_places(ids, pictures), torch.cat(pictures) if pictures else None

    def _content(self, content: str | list[dict[str, Any]]) -> tuple[Any, list[torch.Tensor]]:
        """Return what the template gets of a message, and its embeddings."""
        if isinstance(content, str):
            return content, []
        kinds: list[dict[str, str]] = []
        pictures = []
        for part in content:
            if part["type"] == "text":
                kinds.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image_embeds":
                data = io.BytesIO(base64.b64decode(part["image_embeds"]["data"]))
                pictures.append(torch.load(data, weights_only=True, map_location="cpu"))
                kinds.append({"type": "image"})
            else:
                raise RefusedError(f"Unknown part type: {part['type']}")
        text = "\n".join(part["text"] for part in kinds if part["type"] == "text")
        if not pictures:
            return text, []
        if not self.keeps_order:
            return [{"type": "text", "text": text}, *[{"type": "image"}] * len(pictures)], pictures
        if _iterates_over_content(self._tokenizer.chat_template):
            return kinds, pictures
        missing = len(pictures) - text.count("<image>")
        return "\n".join([*["<image>"] * missing, text]), pictures

    def _with_places(self, ids: list[int], pictures: list[torch.Tensor]) -> list[int]:
        """Give each visual token an id after the vocabulary, counted from the first picture."""
        config = self._model.config
        if ids.count(config.image_token_index) != len(pictures):
            raise RefusedError("All mm_ids_splits should be consumed")
        following = config.text_config.vocab_size
        waiting = iter(pictures)
        out: list[int] = []
        for token in ids:
            if token != config.image_token_index:
                out.append(token)
                continue
            count, width = next(waiting).shape
            if width != config.text_config.hidden_size:
                raise RefusedError("Multimodal embedding_dim must match model hidden_size")
            out += range(following, following + count)
            following += count
        return out

    def _rows(
        self, request: dict[str, Any], ids: list[int], features: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the prompt's embeddings, [1, S, D], out of the cache where its ids are known."""
        key = (request.get("cache_salt"), tuple(ids))
        if key in self._cache:
            self.reused += 1
            return self._cache[key]
        places = torch.tensor(ids)
        outside = places >= self._model.config.text_config.vocab_size
        rows = self._model.get_input_embeddings()(places.masked_fill(outside, 0)).clone()
        if features is not None:
            rows[outside] = features.to(rows.dtype)
        self._cache[key] = rows[None]
        return rows[None]

    @torch.no_grad()
    def _events(
        self, request: dict[str, Any], ids: list[int], features: torch.Tensor | None
    ) -> Iterator[dict[str, Any]]:
        """Write greedily; the first event has no text, the last one no choice."""
        rows = self._rows(request, ids, features)
        embed = self._model.get_input_embeddings()
        written: list[int] = []
        said, finish = "", None
        yield self._event({"role": "assistant"}, len(ids), 0)
        while finish is None:
            states = self._model.model.language_model(inputs_embeds=rows).last_hidden_state
            written.append(int(self._model.lm_head(states[:, -1]).argmax()))
            ends = written[-1] in request["stop_token_ids"]
            finish = "stop" if ends else "length" if len(written) == request["max_tokens"] else None
            kept = written[:-1] if ends else written
            text = self._tokenizer.decode(kept, skip_special_tokens=True)
            if finish is None and text.endswith("\ufffd"):
                text = said  # a character that is not whole yet
            delta = {"content": text[len(said) :]}
            yield self._event(delta, len(ids), len(written), finish)
            said = text
            rows = torch.cat([rows, embed(torch.tensor([[written[-1]]]))], dim=1)
        yield {"choices": [], "usage": _usage(len(ids), len(written))}

    def _event(
        self, delta: dict[str, str], prompt: int, written: int, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "stop_reason": None}
        return {"choices": [choice], "usage": _usage(prompt, written)}


def _usage(prompt: int, written: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _iterates_over_content(template: str) -> bool:
    """Return whether a template takes content as a list of parts: it loops over their types."""
    for loop in Environment(autoescape=True).parse(template).find_all(nodes.For):
        over = loop.iter
        named = (
            isinstance(over, nodes.Getitem)
            and isinstance(over.arg, nodes.Const)
            and over.arg.value == "content"
        )
        if named and isinstance(loop.target, nodes.Name):
            for read in loop.find_all(nodes.Getitem):
                if isinstance(read.arg, nodes.Const) and read.arg.value == "type":
                    return True
    return False
