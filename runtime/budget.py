"""How many visual tokens can be afforded: a bundle's graphs chosen so that answers keep their time.

Enters: how long each frame took from pixels to the first token, and with which budget. Leaves: the
budget for the next one. What a budget costs is measured, not modelled; what it costs under the load
of the moment is that times how much slower the last frames were than measured. A budget is given up
at once when it is too slow and taken back only after it would have fitted for a while, so the
choice does not flap.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from engines.bundle import Bundle
from engines.errors import OptionError
from runtime.camera_parts import Answerer, Estimate, Said
from runtime.frames import Picture
from runtime.vision import VisionEncoder, VisualTokens

_CALM = 0.85
"""A larger budget must be predicted to take less than this share of the target."""
_PATIENCE = 8
"""Frames in a row for which that must hold."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """A change of budget.

    Attributes:
        tokens: the new budget.
        before: the old one.
        predicted_ms: what the new one is expected to take under the load of the moment.
        reason: one sentence.
    """

    tokens: int
    before: int
    predicted_ms: float
    reason: str


class BudgetController:
    """Chooses among budgets; safe to use from several threads.

    Attributes:
        tokens: the budget to use now.
        decisions: every change so far.
    """

    def __init__(self, baseline_ms: Mapping[int, float], target_ms: float) -> None:
        """Begin with the largest budget that fits on an unloaded machine.

        Args:
            baseline_ms: tokens -> time from pixels to the first token, unloaded.
            target_ms: the time to keep.

        Raises:
            OptionError: no budgets, or a target that none of them can keep.
        """
        if not baseline_ms or target_ms <= 0:
            raise OptionError("A latency target needs vision graphs to choose from, and a time.")
        self.decisions: list[Decision] = []
        self._baseline_ms = dict(sorted(baseline_ms.items()))
        self._target_ms = target_ms
        self._load = Estimate()
        self._calm_frames = 0
        self._lock = threading.Lock()
        fitting = [n for n, ms in self._baseline_ms.items() if ms <= target_ms]
        if not fitting:
            least, ms = min(self._baseline_ms.items(), key=lambda item: item[1])
            raise OptionError(
                f"The latency target is {target_ms:.0f} ms, and even {least} visual tokens take "
                f"{ms:.0f} ms on this machine. Set it higher, or build the bundle with fewer "
                "tokens or in a lower precision."
            )
        self.tokens = max(fitting)

    def predicted_ms(self, tokens: int) -> float:
        """Return what a budget is expected to take under the load of the moment."""
        return self._baseline_ms[tokens] * (self._load.seconds if self._load.known else 1.0)

    def observe(self, tokens: int, latency_ms: float) -> Decision | None:
        """Take one measurement and return the change it led to, if any.

        Args:
            tokens: the budget it was made with.
            latency_ms: from pixels to the first token.
        """
        with self._lock:
            self._load.add(latency_ms / self._baseline_ms[tokens])
            if tokens != self.tokens:  # encoded before the last change
                return None
            return self._step_down() or self._step_up()

    def _step_down(self) -> Decision | None:
        smaller = [n for n in self._baseline_ms if n < self.tokens]
        if self.predicted_ms(self.tokens) <= self._target_ms or not smaller:
            return None
        fitting = [n for n in smaller if self.predicted_ms(n) <= self._target_ms]
        return self._decide(max(fitting) if fitting else min(smaller), "too slow")

    def _step_up(self) -> Decision | None:
        larger = [n for n in self._baseline_ms if n > self.tokens]
        if not larger or self.predicted_ms(min(larger)) > _CALM * self._target_ms:
            self._calm_frames = 0
            return None
        self._calm_frames += 1
        if self._calm_frames < _PATIENCE:
            return None
        return self._decide(min(larger), "time to spare")

    def _decide(self, tokens: int, why: str) -> Decision:
        load = self._load.seconds
        reason = (
            f"{why}: {self.predicted_ms(self.tokens):.0f} ms with {self.tokens} visual tokens "
            f"(target {self._target_ms:.0f} ms, load {load:.2f}); now {tokens}"
        )
        decision = Decision(tokens, self.tokens, self.predicted_ms(tokens), reason)
        self.tokens, self._calm_frames = tokens, 0
        self.decisions.append(decision)
        _log.warning("budget: %s", reason)
        return decision


class BudgetedEncoder:
    """Every vision graph of a bundle behind one door; the controller says which one runs."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Load the graphs.

        Raises:
            OptionError: the bundle has only one.
            EngineError: one cannot be loaded.
        """
        budgets = [graph.reducer.tokens for graph in bundle.manifest.vision]
        if len(set(budgets)) < 2:
            raise OptionError(
                f"{bundle.root} holds one vision graph, with {budgets[0]} visual tokens: nothing "
                "to choose from for a latency target. Build it with several, for example "
                "`python -m export.build --tokens 32,64,128`."
            )
        self.controller: BudgetController | None = None
        self._encoders: dict[int, VisionEncoder] = {}
        try:
            for tokens in sorted(set(budgets)):
                self._encoders[tokens] = VisionEncoder(bundle, threads=threads, tokens=tokens)
        except BaseException:
            self.close()
            raise

    def calibrate(
        self, answerer: Answerer, question: str, target_ms: float, rounds: int = 3
    ) -> BudgetController:
        """Measure every budget on 1080p pictures of noise and begin to control.

        Args:
            answerer: what reads the tokens; one token is written and thrown away.
            question: what will be asked.
            target_ms: the time to keep from pixels to the first token.
            rounds: measurements of each, of which the fastest counts; the first warms up.

        Raises:
            OptionError: no budget can keep the target.
        """
        random = np.random.default_rng(0)
        baseline_ms = {}
        for tokens, encoder in self._encoders.items():
            costs_ms = []
            for _ in range(rounds + 1):
                image = random.integers(0, 256, (1080, 1920, 3), dtype=np.uint8)  # nothing reused
                visual = encoder.encode([image])
                said = answerer.answer(visual, question, lambda: None, lambda: True)
                costs_ms.append(sum(visual.milliseconds.values()) + said.prefill_ms)
            baseline_ms[tokens] = min(costs_ms[1:])
        self.controller = BudgetController(baseline_ms, target_ms)
        measured = ", ".join(f"{tokens}: {ms:.0f} ms" for tokens, ms in baseline_ms.items())
        _log.warning("budget: %s; begins with %d", measured, self.controller.tokens)
        return self.controller

    def encode(self, image: Picture) -> VisualTokens:
        """Encode one picture with the budget of the moment."""
        tokens = self.controller.tokens if self.controller else min(self._encoders)
        return self._encoders[tokens].encode([image])

    def close(self) -> None:
        """Free the graphs; calling it again does nothing."""
        for encoder in self._encoders.values():
            encoder.close()

    def __enter__(self) -> BudgetedEncoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ObservedAnswerer:
    """An answerer that tells the controller how long each new frame took."""

    def __init__(self, answerer: Answerer, controller: BudgetController) -> None:
        self._answerer = answerer
        self._controller = controller
        self._last: VisualTokens | None = None

    def answer(
        self,
        visual: VisualTokens,
        question: str,
        prefilled: Callable[[], None],
        interrupted: Callable[[], bool],
    ) -> Said:
        """Answer as the answerer does; tokens that were kept tell nothing and are not counted."""
        said = self._answerer.answer(visual, question, prefilled, interrupted)
        if visual is not self._last:
            latency_ms = sum(visual.milliseconds.values()) + said.prefill_ms
            self._controller.observe(visual.tokens.shape[1], latency_ms)
        self._last = visual
        return said
