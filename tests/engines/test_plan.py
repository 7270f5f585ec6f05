"""Plans on disk: every difference is refused with both values, nothing untrusted is read."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from engines.build import PlanRequest, prepare_plan
from engines.bundle import open_bundle
from engines.errors import EngineError, OptionError
from engines.gpu import Gpu, NoGpu
from engines.manifest import TensorSpec
from engines.targets import find_target
from engines.trt import library as library_module
from engines.trt.batch_profile import ONE_IMAGE, BatchRange, parse_batch, shape_ranges
from engines.trt.builder import choose_gpu, timing_cache_path
from engines.trt.library import TrtLibrary
from engines.trt.plan import (
    Machine,
    PlanRecord,
    ShapeRange,
    adopt_plan,
    find_plan,
    key_path,
    plan_path,
    read_plan,
    read_record,
    sidecar_path,
    write_plan,
)
from tests.small_graph import write_small_bundle

DATA = b"not a real plan, but bytes all the same"
HERE = Machine("ab" * 32, "tensorrt", "10.3.0.26", 87, "Orin", "540.4.0")
RANGE = ShapeRange(min=(1, 3), opt=(1, 3), max=(8, 3))


def make_record(**changes: object) -> PlanRecord:
    fields: dict[str, object] = {
        "onnx_file": "vision.onnx",
        "onnx_sha256": HERE.onnx_sha256,
        "library": HERE.library,
        "library_version": HERE.library_version,
        "target": "jetson-orin",
        "precision": "fp16",
        "sm": HERE.sm,
        "gpu": HERE.gpu,
        "driver": HERE.driver,
        "profile": {"pixel_values": RANGE},
        "flags": ("STRONGLY_TYPED",),
        "workspace_bytes": 1 << 20,
        "build_seconds": 1.0,
        "built_at": "2026-01-01T00:00:00+00:00",
        "foveate": "0.1.0",
    }
    return PlanRecord.model_validate(fields | changes)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "vision.plan"
    write_plan(path, DATA, make_record())
    return path


def test_what_was_written_is_read(plan: Path) -> None:
    data, record = read_plan(plan, HERE)
    assert data == DATA and record.plan_bytes == len(DATA)


@pytest.mark.parametrize(
    ("change", "built", "here"),
    [
        ({"onnx_sha256": "cd" * 32}, "ab" * 32, "cd" * 32),
        ({"library": "tensorrt-rtx"}, "tensorrt", "tensorrt-rtx"),
        ({"library_version": "10.3.0.30"}, "10.3.0.26", "10.3.0.30"),
        ({"sm": 110}, "sm_87", "sm_110"),
        ({"gpu": "Orin Nano"}, "Orin", "Orin Nano"),
    ],
)
def test_each_difference_names_both_values(
    plan: Path, change: dict[str, object], built: str, here: str
) -> None:
    with pytest.raises(EngineError) as caught:
        read_plan(plan, replace(HERE, **change))  # type: ignore[arg-type]
    message = str(caught.value)
    assert f"the plan has {built}, this machine has {here}" in message
    assert "--rebuild" in message


def test_a_new_driver_or_power_mode_is_told_and_not_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "vision.plan"
    write_plan(path, DATA, make_record(power_mode="MAXN", multiprocessors=16))
    here = replace(HERE, driver="540.5.0", power_mode="15W", multiprocessors=16)
    assert read_plan(path, here)[0] == DATA
    assert "driver: the plan has 540.4.0, this machine has 540.5.0" in caplog.text
    assert "power mode: the plan has MAXN, this machine has 15W" in caplog.text
    assert "--rebuild" in caplog.text
    with pytest.raises(EngineError, match="multiprocessors: the plan has 16, this machine has 8"):
        read_plan(path, replace(here, multiprocessors=8))


def test_a_plan_is_chosen_by_the_number_of_images(tmp_path: Path) -> None:
    bundle = open_bundle(write_small_bundle(tmp_path / "bundle"))
    graph, target = bundle.vision(), find_target("rtx-4090")
    bundle.local.mkdir()

    def chosen(batch: int) -> str:
        return find_plan(bundle, graph, target, batch).stem.rpartition("-sm89")[2]

    assert chosen(1) == chosen(4) == "", "the path of the first one to build"
    for batch in (4, 8):
        plan_path(bundle, graph, target, batch).touch()
    assert [chosen(batch) for batch in (1, 4, 5, 8, 9)] == ["-b4", "-b4", "-b8", "-b8", "-b8"]
    plan_path(bundle, graph, target).touch()
    assert [chosen(batch) for batch in (1, 2)] == ["", "-b4"]


def test_all_differences_are_named_together(plan: Path) -> None:
    with pytest.raises(EngineError, match=r"library version.*; compute capability.*; GPU"):
        read_plan(plan, replace(HERE, library_version="11.4.0.106", sm=110, gpu="Thor"))


def test_a_plan_built_ahead_of_time_fits_every_gpu_of_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "vision.plan"
    write_plan(path, DATA, make_record(gpu=None, driver=None))
    assert read_plan(path, replace(HERE, gpu="another", driver="another"))[0] == DATA


@pytest.mark.parametrize("damage", [DATA[:-5], b"x" + DATA[1:], b""])
def test_a_damaged_plan_is_not_read(plan: Path, damage: bytes) -> None:
    plan.write_bytes(damage)
    with pytest.raises(EngineError, match=r"damaged or was replaced.*SHA-256"):
        read_plan(plan, HERE)


def test_a_changed_sidecar_loses_its_signature(plan: Path) -> None:
    path = sidecar_path(plan)
    path.write_text(path.read_text().replace('"fp16"', '"fp32"'))
    with pytest.raises(EngineError, match=r"not built by this user on this machine.*--trust"):
        read_plan(plan, HERE)
    assert read_plan(plan, HERE, trust=True)[0] == DATA


def test_a_stranger_is_trusted_only_when_told(
    plan: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "stranger"))
    with pytest.raises(EngineError, match="signature does not fit"):
        read_plan(plan, HERE)
    adopt_plan(plan)
    assert read_plan(plan, HERE)[0] == DATA


def test_the_key_is_the_users_alone(plan: Path) -> None:
    assert stat.S_IMODE(key_path().stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.unlink(), "there is no such plan"),
        (lambda path: sidecar_path(path).unlink(), r"sidecar vision\.plan\.json is missing"),
        (lambda path: sidecar_path(path).write_text("{"), "damaged"),
        (lambda path: sidecar_path(path).write_text("{}"), r"damaged \(\d+ problems\)"),
    ],
)
def test_what_is_missing_is_named(plan: Path, spoil, expected: str) -> None:
    spoil(plan)
    with pytest.raises(EngineError, match=expected):
        read_plan(plan, HERE)


def test_an_unwritable_key_says_so(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc/nowhere")
    with pytest.raises(EngineError, match=r"plan\.key.*FOVEATE_PLAN_KEY"):
        read_plan(plan, HERE)


def test_the_key_may_lie_elsewhere(
    plan: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FOVEATE_PLAN_KEY", str(tmp_path / "volume" / "key"))
    with pytest.raises(EngineError, match="signature does not fit"):
        read_plan(plan, HERE)
    adopt_plan(plan)
    assert read_plan(plan, HERE)[0] == DATA and (tmp_path / "volume" / "key").is_file()


def test_no_gpu_says_where_to_build() -> None:
    with pytest.raises(EngineError, match=r"here is no GPU: asleep\. Copy the bundle"):
        choose_gpu(find_target("jetson-orin"), NoGpu("asleep"))


def test_another_gpu_is_named_with_its_capability() -> None:
    here = Gpu("RTX 4090", 89, 24 << 30, False, "12.8", "570.1")
    with pytest.raises(EngineError, match=r"jetson-orin has sm_87, this .* RTX 4090 has sm_89"):
        choose_gpu(find_target("jetson-orin"), here)
    assert choose_gpu(find_target("l4"), here) is here
    assert choose_gpu(find_target("rtx-4090"), NoGpu("asleep")) is None


@pytest.mark.parametrize(
    ("target", "version", "expected"),
    [
        ("jetson-orin", "8.6.2.3", r"needs TensorRT 10\.3.*this is 8\.6.*JetPack 6\.2 \(10\.3\)"),
        ("jetson-orin", "10.13.3.9", r"without kernels for sm_87\. Install JetPack 6\.1"),
        ("b200", "10.3.0.26", r"needs TensorRT 10\.8.*Install TensorRT 10\.8 or newer"),
    ],
)
def test_the_wrong_jetpack_or_tensorrt_says_which_works(
    target: str, version: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = TrtLibrary("tensorrt", None, version)
    monkeypatch.setattr(library_module, "load_library", lambda name: found)
    with pytest.raises(EngineError, match=expected):
        library_module.load_library_for(find_target(target))


def test_the_timing_cache_is_keyed_by_library_and_device() -> None:
    library = TrtLibrary("tensorrt", None, "10.3.0.26")
    gpu = Gpu("Orin (nvgpu)", 87, 8 << 30, True, "12.6", "540.4.0")
    path = timing_cache_path(Path("local"), library, gpu)
    assert path == Path("local/timing-tensorrt-10.3.0.26-sm87-Orin--nvgpu-.cache")
    assert timing_cache_path(Path("local"), library, None) is None


def test_a_target_without_plans_says_so(tmp_path: Path) -> None:
    bundle = open_bundle(write_small_bundle(tmp_path / "bundle"))
    with pytest.raises(OptionError, match="ort, runs the ONNX file as it is"):
        prepare_plan(bundle, bundle.vision(), find_target("cpu"), PlanRequest())


def test_plans_of_two_targets_lie_apart(tmp_path: Path) -> None:
    bundle = open_bundle(write_small_bundle(tmp_path / "bundle"))
    names = {
        plan_path(bundle, bundle.vision(), find_target(name)).name
        for name in ("jetson-orin", "jetson-thor", "l4", "rtx-4090")
    }
    assert len(names) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", ONE_IMAGE), ("4", BatchRange(4, 4, 4)), ("1/2/16", BatchRange(1, 2, 16))],
)
def test_batch_is_read(text: str, expected: BatchRange) -> None:
    assert parse_batch(text) == expected


@pytest.mark.parametrize("text", ["", "0", "8/1/1", "1/2", "a", "1/1/-8", "1.5", "²"])
def test_a_batch_that_makes_no_sense(text: str) -> None:
    with pytest.raises(OptionError, match=f'--batch "{text}"'):
        parse_batch(text)


def test_shapes_follow_the_batch() -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 3, 336, 336))
    assert shape_ranges((spec,), BatchRange(1, 1, 8))["x"].max == (8, 3, 336, 336)
    assert shape_ranges((spec,), ONE_IMAGE)["x"].max == (1, 3, 336, 336)


def test_a_fixed_graph_refuses_another_batch() -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=(1, 3, 8, 8))
    assert shape_ranges((spec,), ONE_IMAGE)["x"].max == (1, 3, 8, 8)
    with pytest.raises(OptionError, match=r"x has the fixed shape \[1, 3, 8, 8\]"):
        shape_ranges((spec,), BatchRange(4, 4, 4))


def test_read_record_needs_no_machine(plan: Path) -> None:
    assert read_record(plan).target == "jetson-orin"
