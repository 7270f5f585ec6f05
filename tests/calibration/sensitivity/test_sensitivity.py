"""The search for what to leave in floating point, and the bundled checkpoint in INT8."""

from __future__ import annotations

import math
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

from benchmarks import random_graphs
from calibration.agreement.graphs import compare_graphs
from calibration.agreement.token_metrics import Agreement, Gate
from calibration.scales.apply import apply_calibration
from calibration.scales.calibrate import CalibrationOptions, calibrate
from calibration.scales.calibration_file import Calibration, load_calibration
from calibration.scales.number_format import NumberFormat
from calibration.sensitivity.ranking import few_of
from calibration.sensitivity.report import json_from_report, svg_from_report, table_from_report
from calibration.sensitivity.search import SensitivityReport, search_exclusions
from engines.errors import CalibrationError, FoveateError
from export.checkpoint.llava import open_checkpoint
from export.reducers import reducer_for_budget
from export.vision.to_onnx import export_onnx
from export.vision.vision_module import build_vision_module
from graphs.graph_file import write_graph
from runtime.vision.pictures import load_picture
from runtime.vision.preprocess import preprocess_batch
from tests.photographs import clip_pixels

POCKET = Path("models/pocket-llava")
OPTIONS = CalibrationOptions(method="max", alphas=(0.5,), sample_rows=64, threads=1)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return [pixels[None].astype(np.float32) for pixels in clip_pixels(56)]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing is selected here, so that only the cosine speaks: untrained scores tie."""
    return random_graphs.write_graph(tmp_path_factory.mktemp("none"), "none")[0]


@pytest.fixture(scope="module")
def calibration(graph, frames) -> Calibration:
    return calibrate(graph, frames[:4], OPTIONS)


@pytest.fixture(scope="module")
def report(graph, calibration, frames) -> SensitivityReport:
    with_all = search_exclusions((graph,), calibration, frames[4:6], Gate(0.97, 0.5), threads=1)
    assert with_all.sites == ()
    between = 1 - (1 - with_all.before.cosine) / 3
    return search_exclusions((graph,), calibration, frames[4:6], Gate(0.97, between), threads=1)


def test_a_gate_that_holds_excludes_nothing(graph, calibration, frames) -> None:
    report = search_exclusions((graph,), calibration, frames[4:6], Gate(0.9, 0.9), threads=1)
    assert report.calibration is calibration
    assert report.before == report.after
    assert "holds as it is" in svg_from_report(report)


def test_the_search_meets_the_gate_with_few_layers(report, calibration) -> None:
    assert not report.gate.holds(report.before)
    assert report.gate.holds(report.after)
    assert 1 <= len(report.calibration.excluded) < len(calibration.layers)
    assert len(report.sites) == len(calibration.sites)
    per_weight = [site.cost / site.weights for site in report.sites]
    assert per_weight == sorted(per_weight, reverse=True)


@pytest.mark.parametrize(("count", "each"), [(32, 2), (64, 4), (80, 5), (3, 3)])
def test_a_few_of_many_squares_are_views_and_tiles(count: int, each: int) -> None:
    squares = [np.full((1, 3, 2, 2), at, np.float32) for at in range(count)]
    places = [int(one[0, 0, 0, 0]) for one in few_of(squares)]
    assert len(places) == min(count, 4)
    assert (places[0], places[-1]) == (0, count - 1)
    assert {place % each == 0 for place in places} == {True, False}


def test_its_result_is_replayed_from_a_file(report, graph, frames, tmp_path) -> None:
    report.calibration.save(tmp_path / "c.json")
    model = ir.load(graph)
    apply_calibration(model, load_calibration(tmp_path / "c.json"))
    write_graph(model, tmp_path / "mixed.onnx")
    assert compare_graphs([graph], [tmp_path / "mixed.onnx"], frames[4:6], 1) == report.after


def test_what_is_excluded_already_stays_so(report, graph, frames) -> None:
    again = search_exclusions((graph,), report.calibration, frames[4:6], report.gate, threads=1)
    assert again.calibration.excluded == report.calibration.excluded


@pytest.fixture
def measured(monkeypatch) -> list[tuple[str, ...]]:
    """What each trial that is really measured leaves in floating point."""
    found: list[tuple[str, ...]] = []

    def apply(model: ir.Model, calibration: Calibration, form: NumberFormat) -> None:
        found.append(calibration.excluded)
        apply_calibration(model, calibration, form)

    monkeypatch.setattr("calibration.sensitivity.trials.apply_calibration", apply)
    return found


@pytest.mark.parametrize("stop", [1, 7, 15])
def test_an_interrupted_search_measures_nothing_twice(
    report, graph, calibration, frames, tmp_path, measured, stop
) -> None:
    kept = tmp_path / "trials.json"

    def search(interrupted: bool) -> SensitivityReport:
        def tell(line: str, done: float) -> None:
            if interrupted and len(measured) == stop:
                raise KeyboardInterrupt

        return search_exclusions(
            (graph,), calibration, frames[4:6], report.gate, threads=1, progress=tell, resume=kept
        )

    with pytest.raises(KeyboardInterrupt):
        search(interrupted=True)
    assert len(measured) == stop
    resumed = search(interrupted=False)
    assert json_from_report(resumed) == json_from_report(report)
    assert resumed.calibration.digest() == report.calibration.digest()
    assert len(set(measured)) == len(measured) > stop
    search(interrupted=False)
    assert len(set(measured)) == len(measured), "a search that is done is told again for nothing"


def test_trials_of_something_else_are_not_taken(
    graph, calibration, frames, tmp_path, measured
) -> None:
    kept, loose = tmp_path / "trials.json", Gate(0.0, 0.0)
    search_exclusions((graph,), calibration, frames[:1], loose, threads=1, resume=kept)
    search_exclusions((graph,), calibration, frames[:1], loose, threads=1, resume=kept)
    assert len(measured) == 1
    other_graph = random_graphs.write_graph(tmp_path, "visionzip")[0]
    other_sites = {name: site.model_copy(update={"threshold": site.threshold * 2})
                   for name, site in calibration.sites.items()}  # fmt: skip
    for changed in (
        ((graph,), calibration, frames[1:2]),
        ((other_graph,), calibration, frames[:1]),
        ((graph,), calibration.model_copy(update={"sites": other_sites}), frames[:1]),
    ):
        before = len(measured)
        search_exclusions(*changed, loose, threads=1, resume=kept)
        assert len(measured) == before + 1
    kept.write_text(kept.read_text()[:-9])
    with pytest.raises(CalibrationError, match="cut short or damaged"):
        search_exclusions((graph,), calibration, frames[:1], loose, threads=1, resume=kept)


def test_a_gate_out_of_reach_names_the_worst_layers(graph, calibration, frames) -> None:
    with pytest.raises(FoveateError) as caught:
        search_exclusions((graph,), calibration, frames[4:5], Gate(0.97, 1.1), threads=1)
    assert "cannot be reached" in str(caught.value)
    assert str(caught.value).count(" alone)") == 3


def test_no_frames_to_search_on(graph, calibration) -> None:
    with pytest.raises(CalibrationError, match="no frames to search on"):
        search_exclusions((graph,), calibration, [], Gate(), threads=1)


def test_table_chart_and_json_tell_the_same(report) -> None:
    excluded = report.calibration.excluded
    console = Console(width=140, record=True, file=StringIO())
    console.print(table_from_report(report))
    text = console.export_text()
    chart = ElementTree.fromstring(svg_from_report(report))
    told = json_from_report(report)
    float_sites = [site["site"] for site in told["sites"] if site["excluded"]]
    assert told["excluded"] == list(excluded)
    in_float = [line for line in text.splitlines() if line.rstrip().endswith(" float")]
    assert len(in_float) == len(float_sites)
    bars = [bar for bar in chart.iter() if bar.get("fill") == "#d9480f"]
    assert len(bars) == len(float_sites)
    assert all(site.site in text for site in report.sites)


def test_cost_is_in_multiples_of_what_the_gate_allows() -> None:
    gate = Gate(overlap=0.9, cosine=0.99)
    assert gate.cost(Agreement(0.9, 0.0, 1.0, 0.9)) == pytest.approx(1)
    assert gate.cost(Agreement(0.8, 0.0, 0.98, 0.8)) == pytest.approx(4)
    assert gate.holds(Agreement(0.9, 1.0, 0.99, 0.9))
    assert not gate.holds(Agreement(1.0, 1.0, 0.98, 1.0))
    assert not gate.holds(Agreement(1.0, 1.0, math.nan, 1.0))


def test_a_gate_has_a_floor_for_the_worst_picture_and_for_what_is_merged() -> None:
    assert not Gate().holds(Agreement(0.995, 1.0, 1.0, 0.173))
    assert not Gate().holds(Agreement(0.995, 0.3, 1.0, 0.9))
    assert Gate(worst=0.1, merged=0.3).holds(Agreement(0.995, 0.3, 1.0, 0.173))


def test_a_tightened_gate_allows_less_on_average() -> None:
    gate = Gate(overlap=0.9, cosine=0.98, worst=0.5).tightened(0.5)
    assert (gate.overlap, gate.cosine, gate.worst) == pytest.approx((0.95, 0.99, 0.5))


def test_a_result_must_hold_on_other_frames_too(graph, calibration, frames) -> None:
    """A search that is content with its own frames goes on where others are not."""
    others = compare_on(graph, calibration, frames[5:8])
    assert others.cosine < compare_on(graph, calibration, frames[4:5]).cosine
    gate = Gate(0.97, others.cosine + 1e-5)
    content = search_exclusions((graph,), calibration, frames[4:5], gate, threads=1)
    assert not content.calibration.excluded
    strict = search_exclusions(
        (graph,), calibration, frames[4:5], gate, also_on=frames[5:8], threads=1
    )
    assert strict.calibration.excluded
    assert gate.holds(compare_on(graph, strict.calibration, frames[5:8]))


def compare_on(graph: Path, calibration: Calibration, frames: list[np.ndarray]) -> Agreement:
    with TemporaryDirectory() as folder:
        model = ir.load(graph)
        apply_calibration(model, calibration)
        write_graph(model, Path(folder) / "int8.onnx")
        return compare_graphs([graph], [Path(folder) / "int8.onnx"], frames, 1)


def test_a_large_tower_is_ranked_by_layers_first(graph, calibration, frames, monkeypatch) -> None:
    monkeypatch.setattr("calibration.sensitivity.ranking._RANKED_ALONE", 4)
    lines: list[str] = []

    def search(large: int) -> SensitivityReport:
        monkeypatch.setattr("calibration.sensitivity.search.LARGE", large)
        monkeypatch.setattr("calibration.sensitivity.ranking.LARGE", large)
        lines.clear()
        return search_exclusions(
            (graph,), calibration, frames[4:6], Gate(0.97, 1 - 1e-6), threads=1,
            progress=lambda line, done: lines.append(line),
        )  # fmt: skip

    small, found = search(40), search(3)
    ranked = [line for line in lines if line.endswith(" alone")]
    assert sum(line.startswith("layer of") for line in ranked) == 3
    assert len(ranked) == 3 + 4, "three layers, then four sites"
    assert len(found.sites) == len(small.sites)
    assert found.gate.holds(found.after)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    checkpoint = open_checkpoint(str(POCKET))
    reducer = reducer_for_budget("visionzip", 64, checkpoint.patch_side**2)
    file = tmp_path_factory.mktemp("pocket") / "visionzip.onnx"
    export_onnx(build_vision_module(checkpoint, reducer), file)
    files = sorted((POCKET / "test").glob("*.png"))[::10]
    frames = [
        preprocess_batch([load_picture(picture)], checkpoint.preprocessing) for picture in files
    ]
    return file, frames


def test_the_bundled_checkpoint_in_int8_keeps_patches_and_tokens(pocket, tmp_path) -> None:
    """Judged on pictures that neither calibration nor search has seen."""
    file, frames = pocket
    calibration = load_calibration(POCKET / "calibration.json")
    assert len(calibration.quantized) >= 0.7 * len(calibration.layers)
    model = ir.load(file)
    apply_calibration(model, calibration)
    write_graph(model, tmp_path / "int8.onnx")
    agreement = compare_graphs([file], [tmp_path / "int8.onnx"], frames, 1)
    assert agreement.overlap >= 0.97
    assert agreement.cosine >= 0.99
