"""The build: a bundle whole or not at all, and every refusal before the first slow step."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import Bundle, open_bundle
from engines.chained_session import ChainedSession
from engines.errors import BundleError, EngineError, FoveateError
from engines.openvino_session import OpenVinoSession
from engines.ort import OrtSession
from export.build import build_bundle
from export.build import steps as build_steps
from export.build import vision as build_vision
from export.build.plan import BuildOptions, plan_build
from export.language.language_models import DecoderOptions
from export.vision.to_onnx import trace_graph
from export.vision.vision_module import build_vision_module
from graphs.graph_file import write_graph
from runtime.vision import VisionEncoder
from runtime.vision.graph_pool import GraphPool


@pytest.fixture(scope="session")
def built(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with two budgets of the tiny checkpoint."""
    out = tmp_path_factory.mktemp("built") / "bundle"
    lines: list[str] = []
    options = BuildOptions(
        str(language_checkpoint), out, tokens=(8, "all"), decoders=DecoderOptions(precision="fp32")
    )
    report = build_bundle(options, lambda line, done: lines.append(line))
    assert lines[-1] == "Done"
    assert set(report.seconds) == {"vision_shared", "vision_8", "vision_16", "language_model"}
    assert report.bytes["vision/visionzip_8.onnx"] > 0
    assert report.bytes["vision/tower.onnx"] > report.bytes["vision/visionzip_8.onnx"]
    return open_bundle(out)


def test_bundle_holds_a_graph_for_each_budget(built: Bundle) -> None:
    first, second = built.manifest.vision
    assert (first.reducer.name, first.reducer.tokens) == ("visionzip", 8)
    assert first.reducer.options == {"dominant": 7, "contextual": 1, "merge": "mean"}
    assert (second.reducer.name, second.reducer.tokens) == ("none", 16)
    picture = np.random.default_rng(0).integers(0, 256, (1, 40, 30, 3), dtype=np.uint8)
    for graph in built.manifest.vision:
        with VisionEncoder(built, tokens=graph.reducer.tokens) as encoder:
            encoded = encoder.encode(picture)
        assert encoded.tokens.shape == (1, graph.reducer.tokens, 64)
        assert encoded.valid.tolist() == [graph.reducer.tokens]


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_budgets_share_their_weights(
    built: Bundle, language_checkpoint: Path, tmp_path: Path, engine: str
) -> None:
    """Tower and projector are there once, and each budget says what its whole graph says."""
    graphs = built.manifest.vision
    plan = plan_build(BuildOptions(str(language_checkpoint), tmp_path / "b", tokens=(8, "all")))
    assert [stage.file for stage in built.stages(graphs[1])] == [
        "vision/tower.onnx", "vision/none_16.onnx", "vision/projector.onnx"
    ]  # fmt: skip
    picture = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), dtype=np.uint8)
    apart_bytes = 0
    with GraphPool(built, engine=engine) as pool:
        for graph, reducer in zip(graphs, plan.reducers, strict=True):
            model = trace_graph(build_vision_module(plan.checkpoint, reducer))
            alone = write_graph(model, tmp_path / "alone.onnx").file
            apart_bytes += alone.stat().st_size
            session = OrtSession(alone) if engine == "ort" else OpenVinoSession(alone)
            with session:
                expected = VisionEncoder(built, session, tokens=graph.reducer.tokens)
                wanted = expected.encode(picture)
            for _ in range(2):
                got = pool.encoder(graph.reducer.tokens).encode(picture)
                np.testing.assert_array_equal(got.origin, wanted.origin)
                np.testing.assert_array_equal(got.assignment, wanted.assignment)
                np.testing.assert_array_equal(got.valid, wanted.valid)
                assert np.abs(got.tokens - wanted.tokens).max() <= 1e-6
        first, second = (pool.encoder(graph.reducer.tokens).session for graph in graphs)
        assert isinstance(first, ChainedSession) and isinstance(second, ChainedSession)
        assert first.shared is second.shared
    together_bytes = sum(map(built.graph_bytes, built.manifest.vision_files.files))
    assert together_bytes < 0.8 * apart_bytes


def test_what_was_shared_is_closed_with_its_owner(built: Bundle) -> None:
    picture = np.zeros((1, 40, 30, 3), np.uint8)
    with VisionEncoder(built, tokens=8) as owner:
        with VisionEncoder(built, tokens=16, beside=owner) as other:
            other.encode(picture)
        owner.encode(picture)
        left = VisionEncoder(built, tokens=16, beside=owner)
    with left, pytest.raises(EngineError, match="closed"):
        left.encode(picture)


def test_bundle_says_what_built_it(built: Bundle) -> None:
    assert {"foveate", "torch", "onnx"} <= set(built.manifest.versions)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "no/such/place"}, "no such directory"),
        ({"target": "jetson-oron"}, "Did you mean jetson-orin"),
        ({"reducer": "visionzipp"}, "Did you mean 'visionzip'"),
        ({"tokens": (17,)}, "17"),
        ({"reducer": "none", "tokens": (4,)}, "16 of 16"),
        ({"reducer_options": {"merge": "median"}}, "median"),
        ({"precision": "int8"}, "--precision"),
        ({"precision": "int8", "target": "jetson-orin"}, "is calibrated on your own frames"),
        ({"precision": "fp8", "target": "jetson-orin"}, "takes fp32, fp16, int8, mixed"),
        ({"precision": "fp8", "target": "h100"}, "is calibrated on your own frames"),
        ({"opset": 20}, "opset 20 is not one of"),
    ],
)
def test_refusals_leave_nothing(
    language_checkpoint: Path, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    fields = {"model": str(language_checkpoint), "out": tmp_path / "bundle"} | change
    with pytest.raises(FoveateError, match=says):
        build_bundle(BuildOptions(**fields))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    language_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build_steps, "export_language_models", fill)
    with pytest.raises(BundleError, match="No room to write"):
        build_bundle(BuildOptions(str(language_checkpoint), tmp_path / "bundle", tokens=(4,)))
    assert list(tmp_path.iterdir()) == []


def test_an_old_bundle_is_kept_unless_told(built: Bundle, language_checkpoint: Path) -> None:
    with pytest.raises(BundleError, match="--overwrite"):
        plan_build(BuildOptions(str(language_checkpoint), built.root))
    plan_build(BuildOptions(str(language_checkpoint), built.root, tokens=(8,), overwrite=True))


@pytest.fixture
def run_build(language_checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run the command; returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "export.build", "--model", str(language_checkpoint)]
        command += ["--out", str(tmp_path / "bundle"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def test_dry_run_prints_one_object_and_writes_nothing(
    run_build: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, _ = run_build(
        "--dominant", "5", "--contextual", "3", "--dry-run", "--json", "--target", "cpu"
    )
    assert code == 0
    plan = json.loads(out)
    assert plan["vision"] == [
        {"reducer": "visionzip", "tokens": 8, "dominant": 5, "contextual": 3, "merge": "mean"}
    ]
    assert plan["input"] == "float pixels"
    assert list(tmp_path.iterdir()) == []


def test_a_frame_is_typed_as_height_and_width(
    run_build: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = run_build("--tokens", "8", "--input", "uint8", "--frame", "90x120", "--dry-run")
    assert code == 0
    assert "uint8 frames of 90x120" in out
    code, _, err = run_build("--tokens", "8", "--input", "uint8", "--frame", "wide", "--dry-run")
    assert code == 2
    assert "--frame wide: expected height and width" in err


def test_a_wrong_option_ends_with_two(run_build: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run_build("--tokens", "64,many")
    assert (code, out) == (2, "")
    assert "'many' is not a number of tokens" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("target", ["jetson-orin", "rtx-4090"])
def test_a_device_gets_half_precision_and_a_checked_graph(
    language_checkpoint: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[tuple[str, str]] = []
    check = build_vision.check_graph

    def record(file: Path, tensorrt: str) -> None:
        checked.append((file.name, tensorrt))
        check(file, tensorrt)

    monkeypatch.setattr(build_vision, "check_graph", record)
    options = BuildOptions(
        str(language_checkpoint),
        tmp_path / "b",
        target=target,
        tokens=(8,),
        decoders=DecoderOptions(precision="fp32"),
    )
    build_bundle(options)
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.vision[0].precision == "fp16"
    assert checked == [("visionzip_8.onnx", "10.3")]
    picture = np.random.default_rng(0).integers(0, 256, (1, 40, 30, 3), dtype=np.uint8)
    with VisionEncoder(bundle, engine="ort") as encoder:
        assert np.isfinite(encoder.encode(picture).tokens).all()


def test_a_graph_tensorrt_refuses_is_not_published(
    language_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphs.operator_check._LARGEST_K", 3)
    options = BuildOptions(
        str(language_checkpoint), tmp_path / "b", target="jetson-orin", tokens=(8,)
    )
    with pytest.raises(FoveateError, match=r"TensorRT 10\.3 will refuse TopK 'reducer/TopK'"):
        build_bundle(options)
    assert not (tmp_path / "b").exists()
