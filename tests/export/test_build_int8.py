"""INT8 from the user's frames, whole path: build, calibrate a bundle without PyTorch, replay."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from calibration.agreement.token_metrics import Gate
from calibration.int8.bundle import calibrate_bundle
from calibration.int8.graphs import RECORD_NAME
from calibration.int8.options import Int8Options, gate_from_text
from calibration.int8.report import lines_from_int8
from calibration.int8.resume import ResumeFolder
from calibration.scales.calibration_file import load_calibration
from engines.bundle import Bundle, open_bundle
from engines.errors import CalibrationError, FoveateError, GateError, OptionError, SourceError
from export.build import BuildOptions, BuildReport, build_bundle
from export.build.plan import plan_build
from export.language.language_models import DecoderOptions
from runtime.vision import VisionEncoder
from tests.photographs import load_photographs

ANY = Gate(0.0, 0.0, 0.0, 0.0)
EXACT = Gate(1.0, 1.0)


def drive(frames: int = 24, side: int = 96) -> list[np.ndarray]:
    """Windows along the diagonal of a photograph."""
    photograph = load_photographs()["astronaut.png"]
    starts = np.linspace(0, min(photograph.shape[:2]) - side, frames).astype(int)
    return [photograph[at : at + side, at : at + side] for at in starts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("drive")
    for number, picture in enumerate(drive()):
        Image.fromarray(picture).save(place / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def options(language_checkpoint: Path, folder: Path) -> Callable[..., BuildOptions]:
    def make(out: Path, gate: Gate = ANY, **changes: object) -> BuildOptions:
        fields: dict[str, object] = {
            "tokens": (8, "all"),
            "decoders": DecoderOptions(precision="fp32"),
            "precision": "int8",
            "int8": Int8Options(frames=str(folder), gate=gate),
        }
        return BuildOptions(str(language_checkpoint), out, **fields | changes)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def report(
    options: Callable[..., BuildOptions], tmp_path_factory: pytest.TempPathFactory
) -> BuildReport:
    out = tmp_path_factory.mktemp("int8") / "bundle"
    report = build_bundle(options(out))
    assert list(out.parent.iterdir()) == [out], "something was left beside the bundle"
    return report


@pytest.fixture(scope="module")
def bundle(report: BuildReport) -> Bundle:
    return open_bundle(report.bundle)


@pytest.fixture(scope="module")
def fp32(options: Callable[..., BuildOptions], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("fp32") / "bundle"
    build_bundle(options(out, precision="fp32", int8=Int8Options()))
    return open_bundle(out)


def quantized_layers(file: Path) -> set[str]:
    nodes = ir.load(file).graph
    return {node.metadata_props["foveate.module"] for node in nodes if "Quant" in node.op_type}


def test_every_budget_is_int8_and_says_so(bundle: Bundle, report: BuildReport) -> None:
    assert report.int8 is not None and report.frames is not None
    assert [graph.precision for graph in bundle.manifest.vision] == ["int8", "int8"]
    assert bundle.manifest.calibration_digest == report.frames.digest
    assert RECORD_NAME in bundle.manifest.files
    layers = load_calibration(bundle.path(RECORD_NAME)).layers
    for graph in bundle.manifest.vision:
        tower, *others = bundle.stages(graph)
        found = quantized_layers(bundle.path(tower.file))
        assert found and found <= set(layers)
        assert not any(quantized_layers(bundle.path(one.file)) for one in others)
    assert report.int8.held_out == 3
    assert set(report.int8.agreements) == {graph.file for graph in bundle.manifest.vision}
    assert all(one.cosine > 0.98 for one in report.int8.agreements.values())
    assert load_calibration(bundle.path(RECORD_NAME)).agreement == report.int8.reports
    assert {one.pictures for one in report.int8.reports.values()} == {3}
    told = "\n".join(lines_from_int8(report.int8))
    assert "on 3 frames that nothing was decided on" in told and "warning: 3 frames say" in told


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_it_encodes_as_fp32_does(bundle: Bundle, fp32: Bundle, engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    picture = drive(5)[2][None]
    with VisionEncoder(bundle, engine=engine, tokens=16) as encoder:
        ours = encoder.encode(picture).tokens.ravel()
    with VisionEncoder(fp32, tokens=16) as encoder:
        theirs = encoder.encode(picture).tokens.ravel()
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.98
    assert not np.array_equal(ours, theirs)


def test_a_tensorrt_target_gets_half_precision_around_it(
    options: Callable[..., BuildOptions], tmp_path: Path
) -> None:
    report = build_bundle(options(tmp_path / "b", target="jetson-orin", tokens=(8,)))
    (graph,) = open_bundle(tmp_path / "b").manifest.vision
    assert (graph.precision, graph.opset) == ("int8", 19)
    assert any(note.startswith("opset 19 instead of 18") for note in report.notes)
    model = ir.load(tmp_path / "b" / graph.file)
    types = {value.dtype for value in model.graph.initializers.values()}
    assert {ir.DataType.INT8, ir.DataType.FLOAT16} <= types
    assert report.int8 is not None
    assert report.int8.agreements[graph.file].cosine > 0.98


def test_a_gpu_that_has_it_gets_fp8(options: Callable[..., BuildOptions], tmp_path: Path) -> None:
    report = build_bundle(options(tmp_path / "b", target="rtx-4090", tokens=(8,), precision="fp8"))
    (graph,) = open_bundle(tmp_path / "b").manifest.vision
    assert (graph.precision, graph.opset) == ("fp8", 19)
    model = ir.load(tmp_path / "b" / graph.file)
    types = {value.dtype for value in model.graph.initializers.values()}
    assert {ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT16} <= types
    assert ir.DataType.INT8 not in types
    assert report.int8 is not None
    assert report.int8.agreements[graph.file].cosine > 0.98
    first, *_ = lines_from_int8(report.int8)
    assert first.startswith("  FP8 in ") and first.endswith(" attentions")


def test_a_missed_gate_leaves_nothing_and_names_the_worst(
    options: Callable[..., BuildOptions], tmp_path: Path
) -> None:
    with pytest.raises(GateError, match=r"misses the gate of 100% kept.*What adds most.*layer 0"):
        build_bundle(options(tmp_path / "bundle", EXACT, tokens=(8,)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"int8": Int8Options()}, OptionError, "calibrated on your own frames.*--frames SOURCE"),
        (
            {"precision": "fp16", "target": "l4"},
            OptionError,
            "are for INT8 and FP8, and the precision",
        ),
        ({"int8": Int8Options(frames="no/where.mp4")}, SourceError, "no such file or device"),
        ({"target": "l4", "opset": 18}, OptionError, "--opset 18: l4 runs what is not in 8 bits"),
    ],
)
def test_refused_before_anything_slow(
    options: Callable[..., BuildOptions],
    tmp_path: Path,
    change: dict[str, object],
    error: type[FoveateError],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        plan_build(options(tmp_path / "bundle", **change))
    assert list(tmp_path.iterdir()) == []


def test_a_target_without_int8_is_refused(
    options: Callable[..., BuildOptions], tmp_path: Path
) -> None:
    targets = tmp_path / "targets.toml"
    targets.write_text('[old]\nlike = "cpu"\ntitle = "old"\nprecisions = ["fp32"]\n')
    with pytest.raises(OptionError, match="--precision int8: target old"):
        plan_build(options(tmp_path / "bundle", target="old", targets_file=targets))


def test_calibrating_the_bundle_without_pytorch_gives_the_same_graphs(
    bundle: Bundle, fp32: Bundle, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "int8"
    done = run_without_pytorch(
        *(str(fp32.root), "--frames", str(folder), "--out", str(out), "--json"),
        *("--gate", "overlap=0,cosine=0,worst=0,merged=0"),
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    made = open_bundle(out)
    assert said["passed"] and said["coverage"]["frames"] == 24
    assert "24 distinct frames, expected 128 or more" in done.stderr
    assert made.manifest.calibration_digest == said["frames_sha256"]
    for graph in bundle.manifest.vision_files.files:
        assert made.path(graph.file).read_bytes() == bundle.path(graph.file).read_bytes()
    for name in (made.manifest.language_models[0].file, made.manifest.prompt.tokenizer):
        assert made.path(name).samefile(fp32.path(name)), "hard-linked, not copied"


def test_a_missed_gate_ends_the_command_with_one(
    fp32: Bundle, folder: Path, tmp_path: Path
) -> None:
    done = run_without_pytorch(
        *(str(fp32.root), "--frames", str(folder), "--out", str(tmp_path / "int8")),
        *("--gate", "overlap=1,cosine=1"),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "failed: INT8 misses the gate" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_it_says_what_to_install() -> None:
    done = run_without("onnx_ir")
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'foveate[calibration]'" in done.stderr
    assert "Traceback" not in done.stderr


def run_without_pytorch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_without("torch", "transformers", arguments=arguments)


def run_without(*packages: str, arguments: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run `calibration.calibrate` as if packages were not installed."""
    program = (
        "import importlib.abc, runpy, sys\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name.split('.')[0] in {packages!r}:\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"sys.argv = ['calibrate', *{list(arguments)!r}]\n"
        "runpy.run_module('calibration.calibrate', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_record_gives_the_same_graphs_again(bundle: Bundle, fp32: Bundle, tmp_path: Path) -> None:
    options = Int8Options(record=bundle.path(RECORD_NAME))
    result = calibrate_bundle(fp32, tmp_path / "again", options)
    assert result.frames is None and not result.made.agreements
    again = open_bundle(tmp_path / "again")
    for name in (*(one.file for one in bundle.manifest.vision_files.files), RECORD_NAME):
        assert again.path(name).read_bytes() == bundle.path(name).read_bytes()
    assert again.manifest.calibration_digest == bundle.manifest.calibration_digest


def test_a_changed_record_is_refused_early(
    bundle: Bundle, options: Callable[..., BuildOptions], tmp_path: Path
) -> None:
    text = bundle.path(RECORD_NAME).read_text()
    record = tmp_path / "calibration.json"
    record.write_text(text.replace('"method": "mse"', '"method": "max"'))
    with pytest.raises(CalibrationError, match="was changed after it was written"):
        plan_build(options(tmp_path / "b", int8=Int8Options(record=record)))


def test_an_interrupted_calibration_goes_on(
    bundle: Bundle, fp32: Bundle, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "int8"
    options = Int8Options(frames=str(folder), gate=ANY)
    lines: list[str] = []

    def interrupt(line: str, done: float) -> None:
        lines.append(line)
        if line.endswith("of frame 9"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_bundle(fp32, out, options, progress=interrupt)
    assert list(tmp_path.iterdir()) == [ResumeFolder(out).folder]
    lines.clear()
    calibrate_bundle(fp32, out, options, progress=lambda line, done: lines.append(line))
    assert list(tmp_path.iterdir()) == [out]
    assert not any(line.endswith("channels of frame 5") for line in lines)
    record = open_bundle(out).path(RECORD_NAME)
    assert record.read_bytes() == bundle.path(RECORD_NAME).read_bytes()


def test_mixed_gives_layers_back_until_the_gate_holds(
    fp32: Bundle, folder: Path, tmp_path: Path
) -> None:
    strict = Gate(overlap=0.0, cosine=0.99999, worst=0.0, merged=0.0)
    options = Int8Options(frames=str(folder), gate=strict)
    result = calibrate_bundle(fp32, tmp_path / "mixed", options, precision="mixed")
    made = open_bundle(tmp_path / "mixed")
    excluded = result.made.calibration.excluded
    assert 0 < len(excluded) < len(result.made.calibration.layers)
    assert {graph.precision for graph in made.manifest.vision} == {"mixed"}
    assert all(strict.holds(one) for one in result.made.agreements.values())
    for graph in made.manifest.vision_files.files:
        assert not quantized_layers(made.path(graph.file)) & set(excluded)
    record = made.path(RECORD_NAME)
    with pytest.raises(OptionError, match=r"leaves \d+ layers in floating point.*mixed"):
        Int8Options(record=record).check("int8")
    again = calibrate_bundle(
        fp32, tmp_path / "again", Int8Options(record=record), precision="mixed"
    )
    for name in again.made.written:
        assert (tmp_path / "again" / name).read_bytes() == made.path(name).read_bytes()


def test_an_interrupted_search_goes_on(fp32: Bundle, folder: Path, tmp_path: Path) -> None:
    options = Int8Options(frames=str(folder), gate=Gate(0.0, 0.99999, 0.0, 0.0))
    calibrate_bundle(fp32, tmp_path / "whole", options, precision="mixed")
    lines: list[str] = []

    def interrupt(line: str, done: float) -> None:
        lines.append(line)
        if sum(line.endswith(" alone") for line in lines) == 4:
            raise KeyboardInterrupt

    out = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        calibrate_bundle(fp32, out, options, precision="mixed", progress=interrupt)
    kept = ResumeFolder(out)
    assert sorted(tmp_path.iterdir()) == [kept.folder, tmp_path / "whole"]
    known = json.loads(kept.trials.read_text())
    assert len(known) == 4  # with everything in INT8, and three sites alone
    lines.clear()
    calibrate_bundle(
        fp32, out, options, precision="mixed", progress=lambda line, done: lines.append(line)
    )
    assert not any(line.startswith(("channels", "histograms")) for line in lines)
    assert sorted(tmp_path.iterdir()) == [out, tmp_path / "whole"]
    for name in open_bundle(out).manifest.files:
        if name.startswith("vision/"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_only_a_float32_bundle_is_calibrated(
    bundle: Bundle, fp32: Bundle, folder: Path, tmp_path: Path
) -> None:
    options = Int8Options(frames=str(folder))
    with pytest.raises(OptionError, match="is int8, and calibration starts from fp32"):
        calibrate_bundle(bundle, tmp_path / "b", options)
    with pytest.raises(OptionError, match="is the bundle itself"):
        calibrate_bundle(fp32, fp32.root, options, overwrite=True)


@pytest.mark.parametrize("text", ["overlap", "overlap=2", "speed=0.5", "cosine=much"])
def test_a_gate_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(
        OptionError, match=r"is not overlap or cosine or worst or merged with a number from 0 to 1"
    ):
        gate_from_text(text)


def test_a_gate_may_name_one_measure() -> None:
    assert gate_from_text("overlap=0.9") == Gate(overlap=0.9)
