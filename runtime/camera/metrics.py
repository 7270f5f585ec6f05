"""Show the camera loop's numbers to Prometheus, on the loopback interface, and as one live line.

`http://127.0.0.1:PORT/metrics` has frames, answers, drops and reading errors by reason, the budget
of visual tokens, and histograms of the age of frames and of each stage.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from engines.errors import OptionError
from runtime.camera.metrics_server import ADDRESS, BoundedServer

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, Metric
    from rich.live import Live

    from runtime.camera.budgets.controller import BudgetController
    from runtime.camera.loop import CameraLoop
    from runtime.camera.parts import CameraAnswer

_AGES_S = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
_STAGES_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_RECENT = 30


class MetricsServer:
    """Serves the metrics of one loop until it is closed.

    Attributes:
        port: where; the one asked for, or the free one that was found for 0.
    """

    def __init__(
        self, loop: CameraLoop, port: int, controller: BudgetController | None = None
    ) -> None:
        """Begin to serve.

        Args:
            loop: what is told of.
            port: where; 0 is any that is free.
            controller: what chooses its budgets, if something does.

        Raises:
            OptionError: prometheus-client is not installed, or the port is taken.
        """
        try:
            from prometheus_client import CollectorRegistry, Counter, Histogram, make_wsgi_app
        except ImportError as error:
            raise OptionError(
                "--metrics-port needs prometheus-client, which is not installed. Run: pip install "
                "'foveate[metrics]'"
            ) from error
        registry = CollectorRegistry()
        registry.register(_LoopCounts(loop))
        if controller is not None:
            registry.register(_BudgetState(controller))
        self._age = Histogram(
            "foveate_frame_age_seconds",
            "Age of the frame when the first token of its answer was there.",
            buckets=_AGES_S,
            registry=registry,
        )
        self._stage = Histogram(
            "foveate_stage_seconds",
            "Time of each stage that was computed.",
            ["stage"],
            buckets=_STAGES_S,
            registry=registry,
        )
        self._answers = Counter("foveate_answers", "Answers given.", ["reused"], registry=registry)
        self._tokens = Counter(
            "foveate_answer_tokens", "Tokens the language model wrote.", registry=registry
        )
        try:
            self._server = BoundedServer((ADDRESS, port), make_wsgi_app(registry))
        except (OSError, OverflowError) as error:
            raise OptionError(
                f"The metrics cannot be served on port {port}: "
                f"{getattr(error, 'strerror', None) or error}. Choose another with --metrics-port, "
                "or 0 for any that is free."
            ) from error
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    def observe(self, answer: CameraAnswer) -> None:
        """Count an answer."""
        self._age.observe(answer.age_ms / 1e3)
        self._answers.labels(str(answer.reused).lower()).inc()
        if not answer.reused:
            self._tokens.inc(len(answer.answer.token_ids))
        for stage, ms in answer.milliseconds.items():
            self._stage.labels(stage).observe(ms / 1e3)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _LoopCounts:
    """What the loop counts itself, read when it is asked for."""

    def __init__(self, loop: CameraLoop) -> None:
        self._loop = loop

    def collect(self) -> Iterator[CounterMetricFamily]:
        from prometheus_client.core import CounterMetricFamily

        yield CounterMetricFamily(
            "foveate_frames", "Frames received from the source.", value=self._loop.frames
        )
        for name, text, counts in (
            ("drops", "Frames that were not answered.", self._loop.drops),
            ("source_errors", "What could not be read.", self._loop.errors),
        ):
            family = CounterMetricFamily(f"foveate_{name}", text, labels=["reason"])
            for reason, count in sorted(counts.copy().items()):
                family.add_metric([reason], count)
            yield family


class _BudgetState:
    """What the budget controller chose, read when it is asked for."""

    def __init__(self, controller: BudgetController) -> None:
        self._controller = controller

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        controller = self._controller
        tokens = controller.tokens
        yield GaugeMetricFamily(
            "foveate_budget_tokens", "Visual tokens a frame may have now.", value=tokens
        )
        accuracy = controller.accuracy[tokens]
        if accuracy is not None:
            yield GaugeMetricFamily(
                "foveate_budget_accuracy",
                "Share of right answers that was measured with this budget.",
                value=accuracy,
            )
        yield GaugeMetricFamily(
            "foveate_budget_keeps_goal",
            "1 while the budget is expected to keep the goal; 0: none does.",
            value=float(controller.keeps_goal),
        )
        yield CounterMetricFamily(
            "foveate_budget_decisions",
            "Changes of the budget, and of whether the goal can be kept.",
            value=len(controller.decisions),
        )


class StatusLine:
    """One line on a terminal that says how the loop is doing; use `show` for each answer."""

    def __init__(self, loop: CameraLoop, clock: Callable[[], float] = time.monotonic) -> None:
        self._loop = loop
        self._clock = clock
        self._started_s = clock()
        self._times_s: deque[float] = deque(maxlen=_RECENT)
        self._ages_ms: deque[float] = deque(maxlen=_RECENT)
        self._live: Live | None = None

    def start(self) -> None:
        """Take the last line of stderr."""
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(stderr=True), transient=True, refresh_per_second=4)
        self._live.start()

    def show(self, answer: CameraAnswer) -> None:
        """Take one answer into account and redraw."""
        self._times_s.append(self._clock())
        self._ages_ms.append(answer.age_ms)
        if self._live is not None:
            from rich.text import Text

            line = f"{self.text()} | {' '.join(answer.answer.text.split())}"
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))

    def text(self) -> str:
        """Return the line without the answer."""
        spent_s = max(self._clock() - self._started_s, 1e-9)
        between_s = self._times_s[-1] - self._times_s[0] if len(self._times_s) > 1 else 0.0
        rate = (len(self._times_s) - 1) / between_s if between_s else 0.0
        ages_ms = sorted(self._ages_ms)
        age_ms = ages_ms[len(ages_ms) // 2] if ages_ms else 0.0
        drops = sum(self._loop.drops.values())
        errors = sum(self._loop.errors.values())
        return (
            f"{self._loop.frames / spent_s:.1f} frames/s | {rate:.1f} answers/s | "
            f"age {age_ms:.0f} ms | {drops} not answered | {errors} errors"
        )

    def close(self) -> None:
        """Give the line back."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> StatusLine:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
