"""The budget controller on a machine whose load the test sets."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.errors import OptionError
from runtime.camera.budget import BudgetController, Cost, Goal
from runtime.camera.budget_options import BudgetOptions
from runtime.camera.budgeted import BudgetedEncoder, ObservedAnswerer
from runtime.camera.loop import CameraOptions
from runtime.frames import SourceOptions
from runtime.generate import GenerationOptions
from runtime.model_options import ModelOptions
from runtime.watch import WatchOptions, watch
from tests.runtime.camera.doubles import ShadeAnswerer, ShadeEncoder

LATENCY_MS = {32: 40.0, 64: 60.0, 128: 110.0, 192: 170.0}
COSTS = {tokens: Cost(ms, token_ms=5.0) for tokens, ms in LATENCY_MS.items()}
TARGET_MS = 200.0


def controller_for(target_ms: float, accuracy: dict[int, float] | None = None) -> BudgetController:
    return BudgetController(COSTS, Goal("latency", target_ms), accuracy)


def run(
    controller: BudgetController, loads: list[float], noise: float = 0.0
) -> tuple[list[int], list[float]]:
    """Feed frames; return the budget and the latency of each."""
    rng = np.random.default_rng(0)
    budgets, latencies_ms = [], []
    for load in loads:
        tokens = controller.tokens
        latency_ms = LATENCY_MS[tokens] * load * (1 + noise * rng.standard_normal())
        controller.observe(tokens, Cost(latency_ms))
        budgets.append(tokens)
        latencies_ms.append(latency_ms)
    return budgets, latencies_ms


def test_the_target_is_held_within_a_fifth_when_the_load_doubles() -> None:
    controller = controller_for(TARGET_MS)
    assert controller.tokens == 192
    budgets, latencies_ms = run(controller, [1.0] * 50 + [2.0] * 100 + [1.0] * 100, noise=0.05)
    assert budgets[49] == 192
    settled_ms = latencies_ms[60:150]  # ten frames after the load doubled
    assert max(settled_ms) <= 1.2 * TARGET_MS
    assert budgets[149] == 64  # 120 ms; 128 tokens would take 220
    assert budgets[-1] == 192  # and back
    assert [decision.tokens for decision in controller.decisions] == [128, 64, 128, 192]
    assert "too much: " in controller.decisions[0].reason


def test_each_decision_says_what_it_costs_in_accuracy(caplog: pytest.LogCaptureFixture) -> None:
    controller = controller_for(TARGET_MS, {192: 0.977, 128: 0.961})
    with caplog.at_level(logging.WARNING):
        run(controller, [1.0] * 5 + [2.0] * 20)
    first, second = controller.decisions
    assert first.reason.endswith("now 128, accuracy 97.7% -> 96.1%")
    assert second.reason.endswith("now 64, accuracy 96.1% -> unknown")
    assert [first.reason, second.reason] == [r.message[8:] for r in caplog.records]
    assert re.match(
        r"too much: 2\d\d ms with 192 visual tokens \(goal 200 ms, load 1\.\d+\)", first.reason
    )


def test_noise_around_the_target_does_not_make_it_flap() -> None:
    controller = controller_for(175.0)
    budgets, _ = run(controller, [1.05] * 400, noise=0.15)
    assert len(controller.decisions) <= 3
    assert len(set(budgets[100:])) <= 2


def test_one_slow_frame_changes_nothing() -> None:
    controller = controller_for(TARGET_MS)
    run(controller, [1.0] * 10 + [1.8] + [1.0] * 10)
    assert not controller.decisions


def test_the_smallest_budget_is_kept_when_nothing_fits() -> None:
    budgets, _ = run(controller_for(TARGET_MS), [20.0] * 30)
    assert budgets[-1] == 32


def test_measurements_of_an_earlier_budget_do_not_decide_again() -> None:
    controller = controller_for(100.0)
    assert controller.tokens == 64
    assert controller.observe(128, Cost(500.0)) is None


def test_a_target_that_cannot_be_kept_is_refused_with_what_can() -> None:
    with pytest.raises(OptionError, match="even 32 visual tokens take 40 ms"):
        controller_for(10.0)
    with pytest.raises(OptionError, match=r"goal is 500\.0 tokens/s, and even 32 .* 100\.0"):
        BudgetController(COSTS, Goal("rate", 500.0))
    with pytest.raises(OptionError, match="latency to keep is -1"):
        Goal("latency", -1)


def test_a_rate_is_kept_for_answers_of_the_length_they_have() -> None:
    """8 tokens take 170 / 8 + 5 ms each with 192 visual tokens: 38 tokens/s; 128: 53; 64: 80."""
    controller = BudgetController(COSTS, Goal("rate", 50.0))
    assert controller.tokens == 128
    for _ in range(60):  # answers of 40 tokens: 108 tokens/s with 192
        tokens = controller.tokens
        controller.observe(tokens, COSTS[tokens], answer_tokens=40)
    assert controller.tokens == 192
    for _ in range(60):  # and of 2: 11 tokens/s with 192, 40 with 32, which is the least
        tokens = controller.tokens
        controller.observe(tokens, COSTS[tokens], answer_tokens=2)
    assert controller.tokens == 32


def test_power_is_kept_and_never_refused() -> None:
    """Waiting between answers saves power too, so that a goal below all may still be met."""
    costs = {32: Cost(1.0, watts=12.0), 64: Cost(1.0, watts=16.0)}
    controller = BudgetController(costs, Goal("power", 10.0))
    assert controller.tokens == 32
    for _ in range(30):  # an answer each second: half the power
        controller.observe(controller.tokens, Cost(1.0, watts=costs[controller.tokens].watts / 2))
    assert controller.tokens == 64
    for _ in range(30):  # as fast as it can
        controller.observe(controller.tokens, costs[controller.tokens])
    assert controller.tokens == 32
    assert "goal 10.0 W" in controller.decisions[-1].reason


class Meter:
    """A power meter that has a reading each third time."""

    def __init__(self) -> None:
        self.asked = 0

    def take_watts(self) -> float | None:
        self.asked += 1
        return 7.5 if self.asked % 3 == 0 else None


def test_frames_without_a_power_reading_are_not_counted() -> None:
    controller = BudgetController({1: Cost(1.0, watts=7.5)}, Goal("power", 10.0))
    meter = Meter()
    answerer = ObservedAnswerer(ShadeAnswerer(), controller, meter)
    seen = []
    controller.observe = lambda tokens, cost, length: seen.append((tokens, cost.watts, length))
    for _ in range(7):
        visual = ShadeEncoder().encode(np.zeros((8, 8, 3), np.uint8))
        answerer.answer(visual, "shade?", lambda: None, lambda: False)
        answerer.answer(visual, "shade?", lambda: None, lambda: False)  # kept: tells nothing
    assert meter.asked == 14
    assert seen == [(1, 7.5, 2)] * 2


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        ({"latency_target": "200ms"}, "latency", 200.0),
        ({"latency_target": "0.2s"}, "latency", 200.0),
        ({"latency_target": "200"}, "latency", 200.0),
        ({"tokens_per_second": 12.5}, "rate", 12.5),
        ({"power": "15W"}, "power", 15.0),
        ({"power": "9500mW"}, "power", 9.5),
    ],
)
def test_goals_are_read(given: dict[str, Any], kind: str, value: float) -> None:
    goal = BudgetOptions(**given).goal()
    assert (goal.kind, goal.value) == (kind, pytest.approx(value))


def test_goals_that_make_no_sense() -> None:
    assert BudgetOptions().goal() is None
    with pytest.raises(OptionError, match=r"200 parsecs: expected a number, with one of .*ms, s"):
        BudgetOptions(latency_target="200 parsecs").goal()
    with pytest.raises(OptionError, match="cannot keep two goals"):
        BudgetOptions(latency_target="200ms", power="15W").goal()


def test_a_bundle_with_one_graph_has_nothing_to_choose(language_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="nothing to choose from"):
        BudgetedEncoder(language_bundle)


def test_a_bundle_of_two_budgets_is_watched_with_a_latency_target(
    budgets_bundle: Bundle, tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    bundle = budgets_bundle.root
    lines: list[dict[str, Any]] = []
    options = WatchOptions(
        CameraOptions("What is it?", every_frame=True, reuse=False),
        SourceOptions(),
        GenerationOptions(max_tokens=2),
        goal=Goal("latency", 60_000.0),
    )
    watch(bundle, str(write_video([50, 100, 150])), options, lines.append)
    assert [line.get("visual_tokens") for line in lines] == [12, 12, 12, None]
    with pytest.raises(OptionError, match=r"even (6|12) visual tokens take"):
        watch(
            bundle, str(tmp_path / "clip.mp4"), replace(options, goal=Goal("latency", 1e-3)), print
        )
    with pytest.raises(OptionError, match="Leave one out"):
        watch(
            bundle,
            str(tmp_path / "clip.mp4"),
            replace(options, model=ModelOptions(visual_tokens=6)),
            print,
        )
