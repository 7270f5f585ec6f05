"""Count requests, pictures and tokens for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runtime.model import Answer

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_BATCHES = (1, 2, 4, 8, 16, 32)


class Counters:
    """What `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter(
            "foveate_requests", "Requests by path and status.", ["path", "status"], registry=own
        )
        self.seconds = Histogram(
            "foveate_request_seconds",
            "From a request's first byte to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=own,
        )
        self.stages = Histogram(
            "foveate_stage_seconds",
            "Time of each stage of an answer.",
            ["stage"],
            buckets=_SECONDS,
            registry=own,
        )
        self._pictures = Counter(
            "foveate_pictures", "Pictures, by whether they were known.", ["known"], registry=own
        )
        self._batches = Histogram(
            "foveate_encoded_batch", "Pictures in one run.", buckets=_BATCHES, registry=own
        )
        self._tokens = Counter("foveate_tokens", "Tokens by kind.", ["kind"], registry=own)
        self.cancelled = Counter(
            "foveate_cancelled", "Requests whose client did not wait.", registry=own
        )

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Show a number that is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def observe_picture(self, known: bool) -> None:
        """Count a picture."""
        self._pictures.labels(str(known).lower()).inc()

    def observe_batch(self, count: int, seconds: float) -> None:
        """Count a run of a vision graph."""
        self._batches.observe(count)
        self.stages.labels("encode").observe(seconds)

    def observe_answer(self, answer: Answer, visual_tokens: int) -> None:
        """Count an answer's tokens and times."""
        for stage in ("prefill", "decode"):
            self.stages.labels(stage).observe(answer.milliseconds[stage] / 1e3)
        self._tokens.labels("prompt").inc(answer.prompt_tokens)
        self._tokens.labels("reused").inc(answer.reused_tokens or 0)
        self._tokens.labels("visual").inc(visual_tokens)
        self._tokens.labels("answer").inc(len(answer.token_ids))

    def text(self) -> bytes:
        """Return all as Prometheus text."""
        return generate_latest(self.registry)
