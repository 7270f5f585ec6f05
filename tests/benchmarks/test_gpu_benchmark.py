"""The GPU benchmark as far as a CPU runs it: every way at a small size, and what is printed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import CLIPVisionModel
from typer.testing import CliRunner

from benchmarks import board_table, gpu, gpu_ways, papers_path, random_graphs
from engines import cli
from engines.errors import EngineError, OptionError
from engines.gpu import Gpu, NoGpu
from engines.ort import CUDA
from engines.trt import builder, session
from engines.trt.batch_profile import shape_ranges
from tests.engines.test_doctor import ORIN as ORIN_FACTS

ROOT = Path(__file__).parents[2]
H200 = Gpu("NVIDIA H200", 90, 141_000_000_000, False, "13.0", "580.1")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> gpu_ways.Case:
    folder = tmp_path_factory.mktemp("graphs")
    return gpu_ways.Case(2, 3, folder, H200, random_graphs.TINY, device="cpu")


@pytest.mark.parametrize("way", [way for way in gpu_ways.WAYS if "TensorRT" not in way])
def test_every_way_gives_tokens(
    way: str, case: gpu_ways.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda graph, **options: asked.append(options) or graph)
    timing = gpu.measure(way, case, gpu_ways.WAYS[way])
    assert timing.problem == "" and timing.median_ms is not None
    assert 0 < timing.median_ms <= (timing.p90_ms or 0)
    assert asked == ([{"mode": "reduce-overhead"}] if "compile" in way else [])


def test_the_ways_of_our_graph_agree(case: gpu_ways.Case) -> None:
    exact = gpu_ways.onnxruntime_cuda("fp32")(case)()
    half = gpu_ways.onnxruntime_cuda("fp16")(case)()
    assert exact.shape == half.shape == (2, 16, 64)
    np.testing.assert_allclose(half, exact, atol=0.02)
    kept = gpu_ways.papers_pytorch(case)()
    assert kept.shape == (2, gpu_ways.DOMINANT + gpu_ways.CONTEXTUAL, 64)


def test_cuda_is_asked_for_exact_products_and_a_graph(case: gpu_ways.Case) -> None:
    there = replace(case, device="cuda")
    said = gpu_ways._providers(there, cuda_graph=True)
    assert said == [(CUDA, {"use_tf32": "0", "enable_cuda_graph": "1"})]


def test_a_known_batch_leaves_no_named_axis(case: gpu_ways.Case) -> None:
    from engines.ort import create_inference_session

    file = gpu_ways._onnx_file(case, "fp32")
    opened = create_inference_session(file, axes={"batch": 2})
    shapes = [node.shape for node in (*opened.get_inputs(), *opened.get_outputs())]
    assert all(isinstance(axis, int) for shape in shapes for axis in shape)


@pytest.mark.parametrize(
    ("way", "precision"),
    [("TensorRT, FP16", "fp16"), ("TensorRT, INT8 and FP16 (mixed)", "mixed")],
)
def test_tensorrt_is_built_for_the_batch_and_precision(
    way: str, precision: str, case: gpu_ways.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[builder.BuildOptions] = []

    def build_plan(options: builder.BuildOptions) -> SimpleNamespace:
        built.append(options)
        options.plan.write_bytes(b"plan")
        return SimpleNamespace(plan=options.plan)

    tokens = np.zeros((2, 16, 64), np.float32)
    opened = SimpleNamespace(run=lambda inputs: {"visual_tokens": tokens})
    monkeypatch.setattr(builder, "build_plan", build_plan)
    monkeypatch.setattr(session, "TrtSession", lambda *_: opened)
    monkeypatch.setattr("engines.trt.library.load_library_for", lambda target: None)
    monkeypatch.setattr("engines.trt.cuda_memory.open_cuda_runtime", lambda: None)
    assert gpu.measure(way, case, gpu_ways.WAYS[way]).problem == ""
    (options,) = built
    assert (options.precision, options.target.sm) == (precision, 90)
    assert options.onnx.name == f"{precision}.onnx"
    quantized = "QuantizeLinear" in {node.op_type for node in ir.load(options.onnx).graph}
    assert quantized == (precision == "mixed")
    ranges = shape_ranges(options.inputs, options.batch)["pixel_values"]
    assert ranges.min == ranges.max == (2, 3, 56, 56)


def test_a_gpu_without_a_target_is_named() -> None:
    with pytest.raises(EngineError, match="no TensorRT target has sm_121"):
        gpu_ways.target_of_gpu(replace(H200, sm=121))


class OddError(Exception):
    """Of no kind that anything here knows, as ONNX Runtime's are."""


def fails(case: gpu_ways.Case) -> gpu_ways.Step:
    raise OddError("no kernel | for this")


def gives(value: float) -> Callable[[gpu_ways.Case], gpu_ways.Step]:
    return lambda case: lambda: np.full((case.batch, 16, 64), value)


def test_a_way_that_fails_costs_its_row_only(case: gpu_ways.Case) -> None:
    timing = gpu.measure("odd", case, fails)
    assert timing.median_ms is None and timing.problem == "OddError: no kernel / for this"
    assert "not-a-numbers" in gpu.measure("nan", case, gives(np.nan)).problem


def run_benchmark(*arguments: str) -> Any:
    return CliRunner().invoke(cli.make_app(gpu.main), ["--runs", "3", *arguments])


def test_one_table_with_date_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_gpu", lambda: H200)
    monkeypatch.setattr(gpu_ways, "WAYS", {"good": gives(1.0), "odd": fails})
    printed = run_benchmark().stdout
    assert re.match(r"\d{4}-\d\d-\d\dT.*, NVIDIA H200, sm_90, driver 580\.1, batch 1", printed)
    assert f"torch {torch.__version__}" in printed and "onnxruntime 1." in printed
    assert re.search(r"\| good \| [\d.]+ \| [\d.]+ \| \|\n\| odd \| - \| - \| OddError: ", printed)
    document = json.loads(run_benchmark("--json", "--only", "good").stdout)
    assert [row["way"] for row in document["timings"]] == ["good"]
    assert document["gpu"]["sm"] == 90 and document["versions"]["torch"] and document["measured_at"]


ORIN = Gpu("Orin", 87, 8_000_000_000, True, "12.6", "540.4.0")


class Meter:
    """A board that draws 7.5 W."""

    def take_watts(self) -> float:
        return 7.5


def test_power_and_memory_are_measured_with_the_time(case: gpu_ways.Case) -> None:
    timing = gpu.measure("good", replace(case, gpu=ORIN, meter=Meter()), gives(1.0))
    assert timing.power_w == 7.5 and timing.memory_mb is not None
    assert re.search(r"\| 7\.5 W, \d+ MB \|$", gpu.row_of(timing))


def test_the_table_of_boards_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a copy of the page, by numbers that nobody measured."""
    page = tmp_path / "jetson.md"
    shutil.copy(ROOT / "docs/jetson.md", page)
    before = page.read_text()
    assert board_table.empty_table() in before, "no board has been measured"
    nano = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    facts = replace(ORIN_FACTS, board=nano)
    monkeypatch.setattr(gpu, "find_gpu", lambda: ORIN)
    monkeypatch.setattr(gpu, "read_facts", lambda: facts)
    monkeypatch.setattr(gpu_ways, "WAYS", {"TensorRT, FP16": gives(1.0), "odd": fails})
    assert run_benchmark("--write", "--page", str(page)).exit_code == 0
    filled = page.read_text()
    mine = [line for line in filled.splitlines() if line.startswith("| Jetson Orin Nano |")]
    assert [line.split("|")[2].strip() for line in mine] == [*board_table.WAYS, "odd"]
    tensorrt, *rest, odd = mine
    assert "not measured" not in tensorrt and "JetPack 6.2, power mode MAXN_SUPER" in tensorrt
    assert re.match(
        r"\| Jetson Orin Nano \| TensorRT, FP16 \| [\d.]+ \| [\d.]+ \| - \| \d+ \| 20", tensorrt
    )
    assert all(line.endswith("not measured yet |") for line in rest)
    assert odd.startswith("| Jetson Orin Nano | odd | - | - | - | - | ") and "OddError" in odd
    elsewhere = [line for line in filled.splitlines() if line not in mine]
    assert elsewhere == [
        line for line in before.splitlines() if not line.startswith("| Jetson Orin Nano |")
    ]
    assert run_benchmark("--write", "--page", str(page)).exit_code == 0
    assert len(page.read_text().splitlines()) == len(filled.splitlines()), "rows are replaced"


@pytest.mark.parametrize(
    ("model", "board"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", "Jetson AGX Orin"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "Jetson Orin NX"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "Jetson AGX Thor"),
        (None, "NVIDIA H200"),
    ],
)
def test_a_board_is_known_by_its_device_tree(model: str | None, board: str) -> None:
    assert gpu.board_here(H200, replace(ORIN_FACTS, board=model))[0] == board


def test_a_page_without_the_table_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.md").write_text("nothing")
    monkeypatch.setattr(gpu, "find_gpu", lambda: ORIN)
    refused = run_benchmark("--write", "--page", str(tmp_path / "page.md"))
    assert refused.exit_code == 2 and "has no table between" in refused.stderr
    absent = run_benchmark("--write", "--page", str(tmp_path / "absent.md"))
    assert absent.exit_code == 2 and "cannot be read" in absent.stderr


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r'--only "tpu".*torch\.compile'):
        gpu_ways.choose_ways("tpu")
    monkeypatch.setattr(gpu, "find_gpu", lambda: NoGpu("none is here"))
    refused = run_benchmark()
    assert refused.exit_code == 2 and "measures a CUDA GPU: none is here" in refused.stderr


def test_the_papers_path_runs_where_its_model_is() -> None:
    model = CLIPVisionModel(random_graphs.TINY).eval()
    pixels = torch.zeros(1, 3, 56, 56)
    torch.set_default_device("meta")  # what is made without naming a device is made elsewhere
    try:
        run = papers_path.run_tower(model, pixels)
        tokens, _ = papers_path.visionzip(run, dominant=10, contextual=4)
        papers_path.prumerge(run, plus=True)
    finally:
        torch.set_default_device(None)
    assert tokens.shape == (1, 14, 64) and tokens.device.type == "cpu"
