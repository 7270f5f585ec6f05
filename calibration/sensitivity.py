"""Which layers INT8 costs most, and how few of them in floating point meet a gate.

Enters: a float32 vision graph, a calibration of it, frames and a gate. Leaves: the error of each
site quantized alone, and the same calibration with the costliest sites excluded, as few as the gate
needs. Error is told at the graph's own outputs, in patches kept and tokens that match: an
element-wise difference says nothing once a reducer has picked another patch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from calibration.agreement import Agreement, average_agreement, compare_visual_tokens
from calibration.graph_agreement import run_graph
from calibration.layers import find_sites
from calibration.quantize import apply_calibration
from calibration.record import Calibration
from calibration.statistics import Frames
from engines.errors import CalibrationError, GateError
from engines.progress_bar import Progress


@dataclass(frozen=True)
class Gate:
    """The least agreement that is good enough."""

    overlap: float = 0.97
    cosine: float = 0.99

    def holds(self, agreement: Agreement) -> bool:
        """Return whether both measures are reached."""
        return agreement.overlap >= self.overlap and agreement.cosine >= self.cosine

    def cost(self, agreement: Agreement) -> float:
        """Return the error as a multiple of what the gate allows, both measures added up."""
        allowed = max(1 - self.overlap, 1e-6), max(1 - self.cosine, 1e-6)
        return (1 - agreement.overlap) / allowed[0] + (1 - agreement.cosine) / allowed[1]


@dataclass(frozen=True)
class SiteCost:
    """What it costs to quantize one site and nothing else.

    Attributes:
        site: its name; a norm, or a layer that reads its activation alone.
        layers: what is quantized with it.
        weights: how many numbers those layers multiply by, a measure of their time.
        alone: agreement with only these layers in INT8.
        cost: `Gate.cost` of it.
    """

    site: str
    layers: tuple[str, ...]
    weights: int
    alone: Agreement
    cost: float


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
    graph_file: Path,
    calibration: Calibration,
    frames: Frames,
    gate: Gate = Gate(),
    *,
    threads: int | None = None,
    progress: Progress = lambda line, done: None,
) -> SensitivityReport:
    """Give layers back to floating point until a gate holds.

    What the calibration excludes already stays excluded, so that the gate can be met on one graph
    of a bundle after the other. Sites go in the order of what each costs alone per weight, because
    the weights tell how much time INT8 saves there. How many are needed is found by bisection, and
    each that turns out not to be needed is quantized again.

    Args:
        graph_file: a float32 vision graph with the reducer that is to be right.
        calibration: of its checkpoint.
        frames: float32[1, 3, H, W] each; better others than it was calibrated on.
        gate: what is to be reached.
        threads: CPU threads.
        progress: told of every trial.

    Raises:
        GateError: the gate cannot be reached; the costliest sites are named.
        CalibrationError: the calibration is not of this graph, or there are no frames.
    """
    with TemporaryDirectory() as folder:
        bench = _Bench(graph_file, calibration, frames, threads, Path(folder))
        before = bench.measure(calibration.excluded)
        if gate.holds(before):
            return SensitivityReport((), gate, before, before, calibration)
        costs = _measure_sites(bench, gate, progress)
        chosen, after = _choose_exclusions(bench, costs, gate, progress)
    if not gate.holds(after):
        raise _gate_error(costs, gate, before, after)
    return SensitivityReport(tuple(costs), gate, before, after, calibration.excluding(chosen))


class _Bench:
    """Measures one choice of layers after the other, on the same graph and frames."""

    def __init__(
        self,
        graph_file: Path,
        calibration: Calibration,
        frames: Frames,
        threads: int | None,
        folder: Path,
    ) -> None:
        self.graph_file = graph_file
        self.calibration = calibration
        self.frames = frames
        self.threads = threads
        self.trial_file = folder / "trial.onnx"
        self.sites = [
            (site, left)
            for site in find_sites(ir.load(graph_file))
            if (left := [one for one in site.layers if one.name not in calibration.excluded])
        ]
        self.exact = list(run_graph(graph_file, frames, threads))
        if not self.exact:
            raise CalibrationError("There are no frames to search on, expected at least one.")

    def measure(self, excluded: Collection[str]) -> Agreement:
        """Return the agreement of the graph with all but the excluded layers quantized."""
        model = ir.load(self.graph_file)
        names = tuple(name for name in self.calibration.layers if name in excluded)
        apply_calibration(model, self.calibration.excluding(names))
        ir.save(model, self.trial_file, external_data="trial.data")
        made = run_graph(self.trial_file, self.frames, self.threads)
        return average_agreement(map(compare_visual_tokens, self.exact, made))


def _measure_sites(bench: _Bench, gate: Gate, progress: Progress) -> list[SiteCost]:
    costs = []
    everything = set(bench.calibration.layers)
    for number, (site, layers) in enumerate(bench.sites):
        progress(f"{site.name} alone", 0.8 * number / len(bench.sites))
        names = tuple(layer.name for layer in layers)
        alone = bench.measure(everything - set(names))
        weights = sum(layer.matrix().size for layer in layers)
        costs.append(SiteCost(site.name, names, weights, alone, gate.cost(alone)))
    return sorted(costs, key=lambda cost: cost.cost / cost.weights, reverse=True)


def _choose_exclusions(
    bench: _Bench, costs: Sequence[SiteCost], gate: Gate, progress: Progress
) -> tuple[tuple[str, ...], Agreement]:
    """Return the fewest costly layers without which the gate holds, and the agreement then."""

    def layers_of(sites: Sequence[SiteCost]) -> tuple[str, ...]:
        names = {*bench.calibration.excluded, *(name for cost in sites for name in cost.layers)}
        return tuple(name for name in bench.calibration.layers if name in names)

    few, enough = 0, len(costs)
    chosen, after = list(costs), bench.measure(layers_of(costs))
    if not gate.holds(after):
        return layers_of(chosen), after
    while enough - few > 1:
        middle = (few + enough) // 2
        progress(f"the {middle} costliest sites in floating point", 0.85)
        if gate.holds(found := bench.measure(layers_of(costs[:middle]))):
            enough, chosen, after = middle, list(costs[:middle]), found
        else:
            few = middle
    for cost in reversed(chosen[:-1]):
        progress(f"without {cost.site}", 0.95)
        fewer = [one for one in chosen if one is not cost]
        if gate.holds(found := bench.measure(layers_of(fewer))):
            chosen, after = fewer, found
    return layers_of(chosen), after


def _gate_error(
    costs: Sequence[SiteCost], gate: Gate, before: Agreement, after: Agreement
) -> GateError:
    worst = ", ".join(
        f"{cost.site} (overlap {cost.alone.overlap:.3f}, cosine {cost.alone.cosine:.4f} alone)"
        for cost in sorted(costs, key=lambda cost: cost.cost, reverse=True)[:3]
    )
    return GateError(
        f"The gate (overlap {gate.overlap:g}, cosine {gate.cosine:g}) cannot be reached: overlap "
        f"{before.overlap:.4f} and cosine {before.cosine:.5f} with INT8, {after.overlap:.4f} and "
        f"{after.cosine:.5f} with every layer back in floating point. The costliest are {worst}. "
        "Ask for less than 1, or build with --precision fp16."
    )
