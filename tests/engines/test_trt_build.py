"""Plans built for real by NVIDIA's parser and builder, on a machine that needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines import build
from engines.bundle import open_bundle
from engines.cli import make_app
from engines.errors import EngineError, OptionError
from engines.gpu import NoGpu, find_gpu
from engines.opening import open_session
from engines.targets import find_target
from tests.small_graph import write_small_bundle

pytestmark = [pytest.mark.trt, pytest.mark.usefixtures("compiler")]


def run_build(*arguments: object):
    return CliRunner().invoke(make_app(build.main), [str(item) for item in arguments])


@pytest.mark.parametrize("target", ["rtx-4090", "rtx-6000-ada"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_plan_is_really_built(tmp_path: Path, target: str, precision: str) -> None:
    bundle = write_small_bundle(tmp_path / "bundle", precision=precision)
    result = run_build(bundle, "--target", target, "--json")
    assert result.exit_code == 0, result.stderr
    (answer,) = json.loads(result.stdout)["plans"]
    record = answer["record"]
    assert answer["action"] == "built"
    assert Path(answer["plan"]).stat().st_size == record["plan_bytes"] > 1000
    assert record["library"] == "tensorrt-rtx" and record["library_version"].count(".") == 3
    assert (record["sm"], record["gpu"], record["precision"]) == (89, None, precision)
    assert record["profile"]["pixel_values"]["max"] == [1, 3, 8, 8]
    layers = json.loads(Path(answer["layers"]).read_text())
    assert layers["network"]["kinds"]["NORMALIZATION"] == 1
    assert layers["network"]["kinds"]["TOPK"] == 1
    assert ("HALF" in layers["network"]["output_types"]) == (precision == "fp16")
    assert layers["engine"]["layers"] == sum(layers["engine"]["kinds"].values()) > 3
    assert ("Half" in layers["engine"]["output_types"]) == (precision == "fp16")
    assert open_bundle(bundle).manifest.target == "cpu", "the bundle is whole after a build"


def test_a_plan_that_fits_is_left_alone(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    built = json.loads(run_build(bundle, "--target", "rtx-4090", "--json").stdout)
    plan = Path(built["plans"][0]["plan"])
    before = plan.stat().st_mtime_ns
    again = run_build(bundle, "--target", "rtx-4090")
    assert again.exit_code == 0 and "Already built" in again.stdout
    assert plan.stat().st_mtime_ns == before
    rebuilt = run_build(bundle, "--target", "rtx-4090", "--rebuild")
    assert rebuilt.exit_code == 0 and "Built" in rebuilt.stdout
    assert plan.stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (("--workspace", "64"), "the plan was built with 4096 MB, asked for is 64 MB"),
    ],
)
def test_a_plan_for_other_options_is_refused_with_both_values(
    tmp_path: Path, option: tuple[str, str], expected: str
) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    assert run_build(bundle, "--target", "rtx-4090").exit_code == 0
    refused = run_build(bundle, "--target", "rtx-4090", *option)
    assert refused.exit_code == 2
    assert expected in refused.stderr and "--rebuild" in refused.stderr
    assert run_build(bundle, "--target", "rtx-4090", *option, "--rebuild").exit_code == 0


def test_another_batch_is_another_plan(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    assert run_build(bundle, "--target", "rtx-4090").exit_code == 0
    assert run_build(bundle, "--target", "rtx-4090", "--batch", "4").exit_code == 0
    assert {path.name for path in (bundle / "local").glob("*.plan")} == {
        "vision-tensorrt-rtx-sm89.plan",
        "vision-tensorrt-rtx-sm89-b4.plan",
    }
    refused = run_build(bundle, "--target", "rtx-4090", "--batch", "1/2/4")
    assert refused.exit_code == 2 and "asked for is" in refused.stderr


def test_a_fixed_batch(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    answer = json.loads(run_build(bundle, "--target", "rtx-4090", "--batch", "4", "--json").stdout)
    shapes = answer["plans"][0]["record"]["profile"]["pixel_values"]
    assert set(map(tuple, shapes.values())) == {(4, 3, 8, 8)}


def test_every_graph_of_a_bundle_gets_its_plan(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle", graphs=2)
    one = run_build(bundle, "--target", "rtx-4090", "--tokens", "3")
    assert one.exit_code == 0 and one.stdout.count("Built: ") == 1 and "vision_1-" in one.stdout
    all_ = run_build(bundle, "--target", "rtx-4090")
    assert all_.exit_code == 0
    assert "Built: " in all_.stdout and "Already built: " in all_.stdout
    assert {path.name for path in (bundle / "local").glob("*.plan")} == {
        "vision-tensorrt-rtx-sm89.plan",
        "vision_1-tensorrt-rtx-sm89.plan",
    }


def test_a_damaged_plan_is_not_called_built(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    assert run_build(bundle, "--target", "rtx-4090").exit_code == 0
    plan = next((bundle / "local").glob("*.plan"))
    plan.write_bytes(plan.read_bytes()[:-9])
    refused = run_build(bundle, "--target", "rtx-4090", "--trust")
    assert refused.exit_code == 2
    assert "damaged or was replaced" in refused.stderr
    assert f"`python -m engines.build {bundle} --rebuild`" in refused.stderr
    assert run_build(bundle, "--target", "rtx-4090", "--rebuild").exit_code == 0


def test_a_plan_for_another_target_than_the_bundles_is_found(tmp_path: Path) -> None:
    path = write_small_bundle(tmp_path / "bundle", target="jetson-orin")
    with pytest.raises(OptionError, match=r"no tensorrt-rtx plan.*--target, with one of rtx-4090"):
        open_session(open_bundle(path), engine="tensorrt-rtx")
    assert run_build(path, "--target", "rtx-6000-ada").exit_code == 0
    if isinstance(find_gpu(), NoGpu):
        with pytest.raises(EngineError, match=r"sm_89.*cannot run here.*--engine ort"):
            open_session(open_bundle(path), engine="tensorrt-rtx")


def test_nothing_but_the_plan_and_its_reports_is_left(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    assert run_build(bundle, "--target", "rtx-4090").exit_code == 0
    stem = "vision-tensorrt-rtx-sm89.plan"
    left = {path.name for path in (bundle / "local").iterdir()}
    assert left == {stem, f"{stem}.json", f"{stem}.layers.json"}


def test_a_graph_the_parser_refuses_names_the_operator(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle", refused=True)
    refused = run_build(bundle, "--target", "rtx-4090")
    assert refused.exit_code == 2
    assert "NVIDIA's ONNX parser refuses the graph" in refused.stderr
    assert "Unique" in refused.stderr
    assert not list((bundle / "local").glob("*.plan*")) if (bundle / "local").exists() else True


def test_a_plan_from_elsewhere_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    assert run_build(bundle, "--target", "rtx-4090").exit_code == 0
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody-else"))
    refused = run_build(bundle, "--target", "rtx-4090")
    assert refused.exit_code == 2 and "--trust" in refused.stderr
    adopted = run_build(bundle, "--target", "rtx-4090", "--trust")
    assert adopted.exit_code == 0 and "Adopted" in adopted.stdout
    assert "Already built" in run_build(bundle, "--target", "rtx-4090").stdout


def test_interrupting_stops_the_builder(tmp_path: Path) -> None:
    bundle = open_bundle(write_small_bundle(tmp_path / "bundle"))

    def interrupt(phase: str, done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.prepare_plan(
            bundle, bundle.vision(), find_target("rtx-4090"), build.PlanRequest(), interrupt
        )
    assert not list(bundle.local.glob("*.plan*"))


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    bundle = open_bundle(write_small_bundle(tmp_path / "bundle"))
    seen: list[tuple[str, float]] = []
    build.prepare_plan(
        bundle,
        bundle.vision(),
        find_target("rtx-4090"),
        build.PlanRequest(),
        lambda phase, done: seen.append((phase, done)),
    )
    assert seen[-1] == ("Building engine", 1.0)
    assert all(0 <= done <= 1 for _, done in seen)


def test_the_other_library_needs_its_own_process(tmp_path: Path) -> None:
    from engines.trt.library import load_library, load_polygraphy

    load_polygraphy(load_library("tensorrt-rtx"))
    with pytest.raises(EngineError, match="a process of its own"):
        load_library("tensorrt")


def test_a_precision_the_target_lacks(tmp_path: Path) -> None:
    bundle = open_bundle(write_small_bundle(tmp_path / "bundle", precision="int8"))
    narrow = find_target("rtx-4090").model_copy(update={"precisions": ("fp32", "fp16")})
    said = r"vision.onnx is int8, but rtx-4090 .* takes fp32, fp16\. Export it again"
    with pytest.raises(OptionError, match=said):
        build.prepare_plan(bundle, bundle.vision(), narrow, build.PlanRequest())


def test_too_little_memory_is_told_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    monkeypatch.setattr(build, "read_memory", lambda path: {"MemAvailable": 10**9})
    result = run_build(bundle, "--target", "rtx-4090")
    assert result.exit_code == 0
    assert "about 2.6 GB, 1.0 GB of memory and swap are free" in result.stderr
    assert "sudo fallocate -l 4G /swapfile" in result.stderr
    again = run_build(bundle, "--target", "rtx-4090")
    assert "warning" not in again.stderr, "nothing is built"
    less = run_build(bundle, "--target", "rtx-4090", "--workspace", "64", "--rebuild")
    assert "about 1.6 GB" in less.stderr


def test_the_optimization_level_is_part_of_a_plan(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    chosen = ("--target", "rtx-4090", "--optimization-level", 1, "--json")
    built = run_build(bundle, *chosen)
    assert built.exit_code == 0, built.stderr
    assert json.loads(built.stdout)["plans"][0]["record"]["optimization_level"] == 1
    assert json.loads(run_build(bundle, *chosen).stdout)["plans"][0]["action"] == "current"
    other = run_build(bundle, "--target", "rtx-4090")
    assert other.exit_code == 2
    told = "optimization level: the plan was built at 1, asked for is TensorRT's default"
    assert told in " ".join(other.stderr.split())
    assert run_build(bundle, "--optimization-level", 6).exit_code == 2
