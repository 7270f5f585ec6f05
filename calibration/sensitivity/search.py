"""Search for the layers to leave in floating point so that a gate is met.

Sites are ranked by what each costs, then the costliest are excluded, as few as the gate needs. The
error is measured on the graph's outputs, in patches kept and tokens that match: an element-wise
difference says nothing once a reducer has picked another patch. Decisions follow from the
measurements alone, so a continued search decides the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from calibration.agreement.token_metrics import Agreement, Gate
from calibration.frames.dataset import Frames
from calibration.scales.calibration_file import Calibration
from calibration.scales.layers import find_sites
from calibration.scales.number_format import INT8, NumberFormat
from calibration.sensitivity.ranking import LARGE, Ranking, SiteCost, few_of
from calibration.sensitivity.trials import KnownTrials, Trials
from engines.errors import GateError
from engines.progress_bar import Progress
from graphs.weights_apart import weights_apart

_TRIED_AGAIN = 8
"""Sites of a large tower that are tried in INT8 again once the gate holds, the cheapest first."""
_TIGHTENED = (1.0, 0.7, 0.5, 0.3)
"""Errors to be reached on the frames of the search, in multiples of what the gate allows, until the
gate holds on other frames as well: what just passes where it was searched fails elsewhere."""


@dataclass(frozen=True)
class SensitivityReport:
    """What a search found.

    Attributes:
        sites: every site that was quantized, the costliest for its weights first: the order in
            which they were excluded.
        gate: that was to be met.
        before: agreement with everything quantized that the calibration quantizes.
        after: agreement with what is left.
        calibration: the same, with what the search excluded.
    """

    sites: tuple[SiteCost, ...]
    gate: Gate
    before: Agreement
    after: Agreement
    calibration: Calibration


def search_exclusions(
    graph_files: Sequence[Path],
    calibration: Calibration,
    frames: Frames,
    gate: Gate,
    *,
    also_on: Frames | None = None,
    threads: int | None = None,
    progress: Progress = lambda line, done: None,
    resume: Path | None = None,
    form: NumberFormat = INT8,
) -> SensitivityReport:
    """Give layers back to floating point until a gate holds.

    What the calibration excludes already stays excluded, so that the gate can be met on one graph
    of a bundle after the other. Sites go in the order of what each costs alone per weight, because
    the weights tell how much time INT8 saves there. How many are needed is found by bisection, and
    each that turns out not to be needed is quantized again (of a large tower a few are tried).

    Args:
        graph_files: the files of a float32 vision graph with the reducer that is to be right, in
            the order they run.
        calibration: of its checkpoint.
        frames: float32[1, 3, H, W] each; better others than it was calibrated on.
        gate: what is to be reached.
        also_on: other frames that it must be reached on; where it is not, the search goes on for
            less error on its own.
        threads: CPU threads.
        progress: called for every trial.
        resume: a file that keeps every trial, for searches on other graphs too. What it holds is
            not measured again; it stays, for the caller to remove.
        form: what the layers become.

    Raises:
        GateError: the gate cannot be reached; the costliest sites are named.
        CalibrationError: the calibration is not of this graph, there are no frames, or ``resume``
            is damaged.
    """
    known = KnownTrials(resume)
    with weights_apart(graph_files[0]) as apart:

        def trials_on(these: Frames) -> Trials:
            return Trials(graph_files, apart, calibration, these, threads, known, form)

        trials = trials_on(frames)
        others = trials if also_on is None else trials_on(also_on)
        before = trials.measure(calibration.excluded)
        if gate.holds(before) and gate.holds(others.measure(calibration.excluded)):
            return SensitivityReport((), gate, before, before, calibration)
        sites = find_sites(ir.load(apart))
        ranking = trials if len(sites) <= LARGE else trials_on(few_of(frames))
        costs = Ranking(ranking, calibration, gate, progress).rank(sites)
        for factor in _TIGHTENED:
            search = _Search(trials, calibration, gate.tightened(factor), progress)
            chosen, after = search.choose_exclusions(costs)
            if gate.holds(others.measure(chosen)):
                break
    if not gate.holds(after):
        raise _gate_error(costs, gate, before, after, form)
    return SensitivityReport(tuple(costs), gate, before, after, calibration.excluding(chosen))


@dataclass(frozen=True)
class _Search:
    trials: Trials
    calibration: Calibration
    gate: Gate
    progress: Progress

    def choose_exclusions(self, costs: Sequence[SiteCost]) -> tuple[tuple[str, ...], Agreement]:
        """Return the fewest costly layers without which the gate holds, and the agreement then."""
        few, enough = 0, len(costs)
        chosen, after = list(costs), self._measure_without(costs)
        if not self.gate.holds(after):
            return self._layers_of(chosen), after
        while enough - few > 1:
            middle = (few + enough) // 2
            self.progress(f"the {middle} costliest sites in floating point", 0.85)
            if self.gate.holds(found := self._measure_without(costs[:middle])):
                enough, chosen, after = middle, list(costs[:middle]), found
            else:
                few = middle
        tried_again = chosen[:-1] if len(costs) <= LARGE else chosen[:-1][-_TRIED_AGAIN:]
        for cost in reversed(tried_again):
            self.progress(f"without {cost.site}", 0.95)
            fewer = [one for one in chosen if one is not cost]
            if self.gate.holds(found := self._measure_without(fewer)):
                chosen, after = fewer, found
        return self._layers_of(chosen), after

    def _measure_without(self, sites: Sequence[SiteCost]) -> Agreement:
        return self.trials.measure(self._layers_of(sites))

    def _layers_of(self, sites: Sequence[SiteCost]) -> tuple[str, ...]:
        names = {*self.calibration.excluded, *(name for cost in sites for name in cost.layers)}
        return tuple(name for name in self.calibration.layers if name in names)


def _gate_error(
    costs: Sequence[SiteCost], gate: Gate, before: Agreement, after: Agreement, form: NumberFormat
) -> GateError:
    worst = ", ".join(
        f"{cost.site} (overlap {cost.alone.overlap:.3f}, cosine {cost.alone.cosine:.4f} alone)"
        for cost in sorted(costs, key=lambda cost: cost.cost, reverse=True)[:3]
    )
    return GateError(
        f"The gate ({gate.describe()}) cannot be reached: overlap {before.overlap:.4f} and cosine "
        f"{before.cosine:.5f} with {form.name.upper()}, {after.overlap:.4f} and "
        f"{after.cosine:.5f} with every layer back in floating point. The costliest are {worst}. "
        "Ask for less than 1, or build with --precision fp16."
    )
