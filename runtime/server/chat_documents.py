"""Write answers as OpenAI's API words them, whole or as the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.bundle import Bundle
from runtime.model import Answer
from runtime.server.seen_picture import SeenPicture
from runtime.server.ticket import Ticket

_CUT = ("max_tokens", "context_full")


@dataclass(frozen=True)
class Completion:
    """One answer on its way to a client.

    Attributes:
        model: its name.
        bundle: which wrote it.
        pictures: of the conversation.
        patches: tell which of their patches were kept.
    """

    model: str
    bundle: Bundle
    pictures: Sequence[SeenPicture]
    patches: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer, ticket: Ticket) -> dict[str, Any]:
        """Return the answer as one document."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": _finish_reason(answer),
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": self._usage(answer),
            "foveate": self._own(answer, ticket),
        }

    def first_event(self) -> bytes:
        """Return the event that begins a stream; kept patches that were asked for are in it."""
        more = {"foveate": {"pictures": self._seen()}} if self.patches else {}
        return self._event({"role": "assistant", "content": "", "refusal": None}, more=more)

    def piece_event(self, text: str) -> bytes:
        """Return the event of a piece of the answer."""
        return self._event({"content": text})

    def last_events(self, answer: Answer, ticket: Ticket, include_usage: bool) -> bytes:
        """Return the events that end a stream."""
        own = self._own(answer, ticket)
        events = self._event({}, _finish_reason(answer), {} if include_usage else {"foveate": own})
        if include_usage:
            last = {"choices": [], "usage": self._usage(answer), "foveate": own}
            events += event({**self._head("chat.completion.chunk"), **last})
        return events + b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        checksum = self.bundle.manifest.checksum or "unknown"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fp_{checksum[:10]}",
        }

    def _event(
        self, delta: dict[str, Any], finish: str | None = None, more: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **(more or {})})

    def _usage(self, answer: Answer) -> dict[str, Any]:
        written = len(answer.token_ids)
        return {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": answer.prompt_tokens + written,
            "prompt_tokens_details": {
                "cached_tokens": answer.reused_tokens or 0,
                "image_tokens": sum(picture.count for picture in self.pictures),
            },
        }

    def _own(self, answer: Answer, ticket: Ticket) -> dict[str, Any]:
        """Return what OpenAI's API has no field for."""
        stages: dict[str, float] = {}
        for spent in (*(picture.milliseconds for picture in self.pictures), answer.milliseconds):
            for stage, ms in spent.items():
                stages[stage] = stages.get(stage, 0.0) + ms
        stages["total"] = ticket.spent_s * 1e3
        own: dict[str, Any] = {
            "visual_tokens": [picture.count for picture in self.pictures],
            "milliseconds": {stage: round(ms, 3) for stage, ms in stages.items()},
            "finish": answer.finish,
            "backend": answer.backend,
        }
        if self.patches:
            own["pictures"] = self._seen()
        return own

    def _seen(self) -> list[dict[str, Any]]:
        return [picture.document(self.bundle) for picture in self.pictures]


def event(document: dict[str, Any]) -> bytes:
    """Return a document as an event of a stream."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def _finish_reason(answer: Answer) -> str:
    return "length" if answer.finish in _CUT else "stop"
