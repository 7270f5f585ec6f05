"""`foveate triton`: what it writes, what of it an engine loads, and what it refuses.

`test_triton_server.py` serves it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from engines.bundle import Bundle, open_bundle
from engines.cli import make_app
from engines.errors import BundleError, EngineError, OptionError
from engines.opening import target_of
from engines.ort import OrtSession
from engines.trt.plan import PlanRecord, ShapeRange, plan_path, write_plan
from runtime import VisionEncoder
from runtime.commands.triton import main
from runtime.model_repository.configs import MARK, RepositoryOptions
from runtime.model_repository.repository import write_repository
from runtime.model_repository.text_format import Word, text_from_message
from tests.tiny_bundle import tiny_manifest, write_tiny_bundle


@pytest.fixture(scope="module")
def one_budget_bundle(
    language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The tiny checkpoint with one whole vision graph of 6 visual tokens."""
    from export.build.plan import BuildOptions
    from export.build.steps import build_bundle

    out = tmp_path_factory.mktemp("one-budget") / "bundle"
    build_bundle(BuildOptions(str(language_checkpoint), out, tokens=(6,)))
    return open_bundle(out)


VISION = f"""\
{MARK}
name: "rover_vision_6"
backend: "onnxruntime"
max_batch_size: 8
input {{
  name: "pixel_values"
  data_type: TYPE_FP32
  dims: 3
  dims: 28
  dims: 28
}}
output {{
  name: "visual_tokens"
  data_type: TYPE_FP32
  dims: 6
  dims: 64
}}
output {{
  name: "valid_count"
  data_type: TYPE_INT64
  dims: 1
  reshape {{
  }}
}}
output {{
  name: "patch_index"
  data_type: TYPE_INT64
  dims: 6
}}
output {{
  name: "assignment"
  data_type: TYPE_INT64
  dims: 16
}}
dynamic_batching {{
  max_queue_delay_microseconds: 500
}}
default_model_filename: "model.onnx"
"""


def test_the_text_format_nests_repeats_and_escapes() -> None:
    message = {
        "name": 'a "b"\n\u00fc',
        "kind": Word("KIND_CPU"),
        "on": True,
        "step": [{"key": 1}, {"key": 2.5}],
        "dims": [3, -1],
        "none": [],
        "empty": {},
    }
    assert text_from_message(message) == (
        'name: "a \\"b\\"\\n\\u00fc"\nkind: KIND_CPU\non: true\nstep {\n  key: 1\n}\n'
        "step {\n  key: 2.5\n}\ndims: 3\ndims: -1\nempty {\n}\n"
    )


def test_the_vision_model_is_the_graph_and_loads_where_it_lies(
    one_budget_bundle: Bundle, tmp_path: Path
) -> None:
    options = RepositoryOptions(
        name="rover", vision="onnxruntime", visual_tokens=6, queue_delay_us=500
    )
    written = write_repository(one_budget_bundle, tmp_path / "repo", options)
    assert [path.name for path in written] == ["rover_preprocess", "rover_vision_6", "rover_6"]
    vision = written[1]
    assert (vision / "config.pbtxt").read_text() == VISION
    # Alone in its folder, with its weights.
    moved = shutil.move(vision / "1", tmp_path / "elsewhere")
    pictures = np.random.default_rng(0).integers(0, 255, (2, 40, 60, 3), np.uint8)
    with (
        OrtSession(Path(moved) / "model.onnx", threads=1) as session,
        VisionEncoder(one_budget_bundle, session, tokens=6) as copied,
        VisionEncoder(one_budget_bundle, tokens=6, engine="ort", threads=1) as encoder,
    ):
        np.testing.assert_array_equal(
            copied.encode(pictures).tokens, encoder.encode(pictures).tokens
        )


def test_names_shapes_and_types_are_those_in_the_file(budgets_bundle: Bundle) -> None:
    """The configuration is written from the manifest, so the manifest must tell of the graph."""
    names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
    for graph in budgets_bundle.manifest.vision_files.files:
        model = onnx.load(budgets_bundle.path(graph.file), load_external_data=False)
        for specs, values in (
            (graph.inputs, model.graph.input),
            (graph.outputs, model.graph.output),
        ):
            assert [(spec.name, spec.dtype, len(spec.shape)) for spec in specs] == [
                (
                    value.name,
                    names[value.type.tensor_type.elem_type],
                    len(value.type.tensor_type.shape.dim),
                )
                for value in values
            ]


def test_the_ensemble_leads_a_picture_through_both_models(
    budgets_bundle: Bundle, tmp_path: Path
) -> None:
    write_repository(budgets_bundle, tmp_path, RepositoryOptions(max_batch=4))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("foveate_12", "foveate_6", "foveate_preprocess"),
        *("foveate_vision_12", "foveate_vision_6"),
    ]
    ensemble = (tmp_path / "foveate_12" / "config.pbtxt").read_text()
    assert 'platform: "ensemble"' in ensemble
    assert "max_batch_size: 4" in ensemble
    assert 'name: "picture"\n  data_type: TYPE_STRING\n  dims: 1\n' in ensemble
    first, second = ensemble.split("  step {\n")[1:]
    assert 'model_name: "foveate_preprocess"' in first
    assert 'model_name: "foveate_vision_12"' in second
    assert "reshape" not in ensemble
    assert (tmp_path / "foveate_12" / "1").is_dir()


def test_glue_has_the_preprocessing_and_the_engine_of_the_bundle(
    budgets_bundle: Bundle, tmp_path: Path
) -> None:
    options = RepositoryOptions(vision="python", engine="openvino", visual_tokens=12)
    write_repository(budgets_bundle, tmp_path, options)
    glue = (tmp_path / "foveate_preprocess" / "config.pbtxt").read_text()
    (line,) = [line for line in glue.splitlines() if "string_value" in line]
    text = json.loads(line.partition(": ")[2])
    assert text == budgets_bundle.preprocessing.model_dump_json()
    vision = (tmp_path / "foveate_vision_12" / "config.pbtxt").read_text()
    for value in (str(budgets_bundle.root.resolve()), "12", "openvino", "8"):
        assert f"string_value: {json.dumps(value)}" in vision
    assert [path.name for path in (tmp_path / "foveate_vision_12" / "1").iterdir()] == ["model.py"]


def test_budgets_that_share_a_tower_are_run_by_this_package(
    budgets_bundle: Bundle, tmp_path: Path
) -> None:
    for backend in ("onnxruntime", "tensorrt"):
        with pytest.raises(OptionError, match="share their tower, and Triton runs one file"):
            write_repository(budgets_bundle, tmp_path, RepositoryOptions(vision=backend))
    write_repository(budgets_bundle, tmp_path, RepositoryOptions())
    vision = (tmp_path / "foveate_vision_6" / "config.pbtxt").read_text()
    assert 'backend: "python"' in vision
    handed_on = vision.partition("output {")[2]
    assert "reduced_tokens" not in handed_on
    assert 'name: "visual_tokens"\n  data_type: TYPE_FP32\n  dims: 6\n' in handed_on
    assert 'name: "pixel_values"' in vision.partition("output {")[0]


def test_models_of_others_are_never_replaced(budgets_bundle: Bundle, tmp_path: Path) -> None:
    arguments = [str(budgets_bundle.root), "--out", str(tmp_path), "--visual-tokens", "6"]
    (tmp_path / "resnet").mkdir()
    command = make_app(main)
    done = CliRunner().invoke(command, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["models"]) == 3
    again = CliRunner().invoke(command, arguments)
    assert again.exit_code == 2
    assert "is already there. Pass --overwrite" in again.stderr
    assert CliRunner().invoke(command, [*arguments, "--overwrite"]).exit_code == 0
    (tmp_path / "foveate_6" / "config.pbtxt").write_text('name: "mine"')
    refused = CliRunner().invoke(command, [*arguments, "--overwrite"])
    assert refused.exit_code == 2
    assert "was not written by `foveate triton`" in refused.stderr
    assert (tmp_path / "foveate_6" / "config.pbtxt").read_text() == 'name: "mine"'
    assert (tmp_path / "resnet").is_dir()


def orin_bundle(root: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("FOVEATE_PLAN_KEY", str(root / "plan.key"))
    return open_bundle(write_tiny_bundle(root / "bundle", target="jetson-orin"))


def add_plan(bundle: Bundle, smallest: int, largest: int, digest: str = "") -> Path:
    graph, target = bundle.vision(), target_of(bundle)
    plan = plan_path(bundle, graph, target, largest)
    plan.parent.mkdir(exist_ok=True)
    record = PlanRecord(
        onnx_file=graph.file,
        onnx_sha256=digest or bundle.manifest.files[graph.file].sha256,
        library="tensorrt",
        library_version="10.3.0",
        target=target.name,
        precision="fp16",
        sm=87,
        gpu="Orin",
        driver=None,
        profile={
            "pixel_values": ShapeRange(
                min=(smallest, 3, 8, 8), opt=(largest, 3, 8, 8), max=(largest, 3, 8, 8)
            )
        },
        flags=(),
        workspace_bytes=0,
        build_seconds=1.0,
        built_at="2026-11-21",
        foveate="0.1.0",
    )
    write_plan(plan, b"plan", record)
    return plan


def test_a_plan_is_served_with_the_batch_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = orin_bundle(tmp_path, monkeypatch)
    plan = add_plan(bundle, 1, 4)
    write_repository(bundle, tmp_path / "repo")
    vision = tmp_path / "repo" / "foveate_vision_2"
    text = (vision / "config.pbtxt").read_text()
    assert 'backend: "tensorrt"\nmax_batch_size: 4\n' in text
    assert (vision / "1" / "model.plan").read_bytes() == plan.read_bytes()
    for model in ("foveate_preprocess", "foveate_2"):
        assert "max_batch_size: 4\n" in (tmp_path / "repo" / model / "config.pbtxt").read_text()


def test_a_plan_that_triton_could_not_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_budget_bundle: Bundle
) -> None:
    bundle = orin_bundle(tmp_path, monkeypatch)
    with pytest.raises(EngineError, match="there is no such plan"):
        write_repository(bundle, tmp_path / "repo")
    plan = add_plan(bundle, 4, 4)
    with pytest.raises(EngineError, match="takes 4 to 4 pictures, expected 1 to 8"):
        write_repository(bundle, tmp_path / "repo")
    add_plan(bundle, 1, 4, digest="0" * 64)
    with pytest.raises(EngineError, match=r"was built of another vision\.onnx"):
        write_repository(bundle, tmp_path / "repo", RepositoryOptions(max_batch=4))
    plan.write_bytes(b"another")
    with pytest.raises(EngineError, match="damaged or was replaced"):
        write_repository(bundle, tmp_path / "repo")
    with pytest.raises(EngineError, match="whose plans Triton's backend tensorrt does not run"):
        write_repository(one_budget_bundle, tmp_path / "repo", RepositoryOptions(vision="tensorrt"))
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "a/b"}, "expected letters, digits"),
        ({"name": ""}, "expected letters, digits"),
        ({"engine": "ort"}, "--engine is of --vision python alone"),
    ],
)
def test_options_that_cannot_be_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        RepositoryOptions(**changes)


def test_a_graph_without_a_batch_is_refused(tmp_path: Path) -> None:
    vision = tiny_manifest()["vision"]
    vision[0]["inputs"][0]["shape"] = [1, 3, 8, 8]
    bundle = open_bundle(write_tiny_bundle(tmp_path / "bundle", vision=vision))
    with pytest.raises(BundleError, match=r"pixel_values of vision\.onnx has no batch"):
        write_repository(bundle, tmp_path / "repo")
