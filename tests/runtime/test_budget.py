"""The budget controller on a machine whose load the test sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.errors import OptionError
from runtime.budget import BudgetController, BudgetedEncoder
from runtime.camera import CameraOptions
from runtime.frames import SourceOptions
from runtime.generate import GenerationOptions
from runtime.model_options import ModelOptions
from runtime.watch import WatchOptions, watch

BASELINE_MS = {32: 40.0, 64: 60.0, 128: 110.0, 192: 170.0}


def run(
    controller: BudgetController, loads: list[float], noise: float = 0.0
) -> tuple[list[int], list[float]]:
    """Feed frames; return the budget and the latency of each."""
    rng = np.random.default_rng(0)
    budgets, latencies_ms = [], []
    for load in loads:
        tokens = controller.tokens
        latency_ms = BASELINE_MS[tokens] * load * (1 + noise * rng.standard_normal())
        controller.observe(tokens, latency_ms)
        budgets.append(tokens)
        latencies_ms.append(latency_ms)
    return budgets, latencies_ms


def test_the_target_is_held_within_a_fifth_when_the_load_doubles() -> None:
    controller = BudgetController(BASELINE_MS, target_ms=200.0)
    assert controller.tokens == 192
    budgets, latencies_ms = run(controller, [1.0] * 50 + [2.0] * 100 + [1.0] * 100, noise=0.05)
    assert budgets[49] == 192
    settled_ms = latencies_ms[60:150]  # ten frames after the load doubled
    assert max(settled_ms) <= 1.2 * 200
    assert budgets[149] == 64  # 120 ms; 128 tokens would take 220
    assert budgets[-1] == 192  # and back
    assert [decision.tokens for decision in controller.decisions] == [128, 64, 128, 192]
    assert "too slow" in controller.decisions[0].reason


def test_noise_around_the_target_does_not_make_it_flap() -> None:
    controller = BudgetController(BASELINE_MS, target_ms=175.0)
    budgets, _ = run(controller, [1.05] * 400, noise=0.15)
    assert len(controller.decisions) <= 3
    assert len(set(budgets[100:])) <= 2


def test_one_slow_frame_changes_nothing() -> None:
    controller = BudgetController(BASELINE_MS, target_ms=200.0)
    run(controller, [1.0] * 10 + [1.8] + [1.0] * 10)
    assert not controller.decisions


def test_the_smallest_budget_is_kept_when_nothing_fits() -> None:
    controller = BudgetController(BASELINE_MS, target_ms=200.0)
    budgets, _ = run(controller, [20.0] * 30)
    assert budgets[-1] == 32


def test_measurements_of_an_earlier_budget_do_not_decide_again() -> None:
    controller = BudgetController(BASELINE_MS, target_ms=100.0)
    assert controller.tokens == 64
    assert controller.observe(128, 500.0) is None


def test_a_target_that_cannot_be_kept_is_refused_with_what_can() -> None:
    with pytest.raises(OptionError, match="even 32 visual tokens take 40 ms"):
        BudgetController(BASELINE_MS, target_ms=10.0)


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
        latency_target_ms=60_000.0,
    )
    watch(bundle, str(write_video([50, 100, 150])), options, lines.append)
    assert [line.get("visual_tokens") for line in lines] == [12, 12, 12, None]
    with pytest.raises(OptionError, match=r"even (6|12) visual tokens take"):
        watch(bundle, str(tmp_path / "clip.mp4"), replace(options, latency_target_ms=1e-3), print)
    with pytest.raises(OptionError, match="Leave one out"):
        watch(
            bundle,
            str(tmp_path / "clip.mp4"),
            replace(options, model=ModelOptions(visual_tokens=6)),
            print,
        )
