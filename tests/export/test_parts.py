"""A vision graph in three parts computes what it computes whole, in each precision."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import random_graphs
from engines.errors import OptionError
from engines.manifest import Graph, Precision
from engines.ort import OrtSession, open_files
from engines.targets import find_target
from engines.trt.batch_profile import BatchRange
from engines.trt.builder import PlanTask, build_plan
from engines.trt.compiler_cache import add_compiler_to_path
from export.reducers import make_reducer
from export.vision.parts import VisionParts, build_parts
from graphs.float16 import convert_to_fp16
from graphs.graph_file import write_graph
from graphs.joined import load_joined
from graphs.operator_check import check_graph

REDUCERS = {
    "visionzip": make_reducer("visionzip", dominant=12, contextual=4),
    "scope": make_reducer("scope", budget=9),
    "pool": make_reducer("pool", budget=16),
    "none": make_reducer("none"),
}
TOKENS = BatchRange(9, 16, 64)
Files = dict[str, list[Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Tower, reducer and projector of each reducer, in FP32."""
    folder = tmp_path_factory.mktemp("parts")
    parts = VisionParts(random_graphs.make_graph("visionzip", random_graphs.TINY))
    ends = [
        write_graph(part, folder / name).file
        for part, name in (
            (parts.trace_tower(), "tower.onnx"),
            (parts.trace_projector(), "projector.onnx"),
        )
    ]
    return {
        name: [
            ends[0],
            write_graph(parts.trace_reducer(one), folder / f"{name}.onnx").file,
            ends[1],
        ]
        for name, one in REDUCERS.items()
    }


def in_half(file: Path) -> Path:
    model = ir.load(file)
    convert_to_fp16(model)
    return write_graph(model, file.with_name(f"half_{file.name}")).file


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", REDUCERS)
def test_parts_in_turn_are_the_whole_graph(
    files: Files, name: str, precision: Precision, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(1).standard_normal((3, 3, 56, 56)).astype(np.float32)
    model, stages = load_joined(files[name]), files[name]
    if precision == "fp16":
        convert_to_fp16(model)
        stages = [in_half(file) for file in stages]
    for stage in stages:
        check_graph(stage, "10.3")
    whole = write_graph(model, tmp_path / "whole.onnx").file
    with OrtSession(whole) as alone, open_files(stages) as chained:
        wanted = alone.run({"pixel_values": pixels})
        got = chained.run({"pixel_values": pixels})
    assert set(got) == set(wanted), "nothing between the parts is handed out"
    for output, array in wanted.items():
        if output == "visual_tokens":
            assert np.abs(got[output] - array).max() <= 1e-6
        else:
            np.testing.assert_array_equal(got[output], array)


def test_a_reducer_reads_what_it_needs_and_has_no_weights(files: Files) -> None:
    read = {
        name: {value.name for value in ir.load(stages[1]).graph.inputs}
        for name, stages in files.items()
    }
    assert read["pool"] == read["none"] == {"features"}
    assert {"features", "class_token", "scores", "keys"} == read["visionzip"]
    for stages in files.values():
        assert stages[1].stat().st_size < 0.2 * stages[0].stat().st_size


def test_reducers_of_different_scores_are_refused() -> None:
    reducers = [
        make_reducer("visionzip", dominant=3, contextual=1),
        make_reducer("prumerge", budget=4),
    ]
    with pytest.raises(OptionError, match="scores of different layers"):
        build_parts(None, reducers)  # type: ignore[arg-type]  # refused before it is opened


@pytest.mark.trt
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nvidia_builds_the_parts(files: Files, precision: Precision, tmp_path: Path) -> None:
    """Of the projector a plan for every number of tokens; a reducer's has next to no bytes."""
    if not add_compiler_to_path():
        pytest.skip("NVIDIA's compiler is not installed: python -m engines.install_trt_rtx")
    for stage in dict.fromkeys(file for stages in files.values() for file in stages):
        typed = stage if precision == "fp32" else in_half(stage)
        graph = _graph_of(typed, precision)
        task = PlanTask(
            typed,
            hashlib.sha256(typed.read_bytes()).hexdigest(),
            tmp_path / f"{stage.stem}.plan",
            find_target("rtx-4090"),
            precision,
            graph.inputs,
            tokens=TOKENS,
        )
        record = build_plan(task).record
        if stage.stem == "projector":
            taken = record.profile["reduced_tokens"]
            assert (taken.min[1], taken.opt[1], taken.max[1]) == (9, 16, 64)


def _graph_of(file: Path, precision: Precision) -> Graph:
    exported = write_graph(ir.load(file), file)
    return Graph(
        file=file.name,
        inputs=exported.inputs,
        outputs=exported.outputs,
        precision=precision,
        opset=exported.opset,
    )
