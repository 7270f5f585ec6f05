"""The doctor: what it reads from a system, what it makes of it, and the commands it gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines import doctor, language_packages
from engines.bundle import Bundle, open_bundle
from engines.cli import make_app
from engines.device_facts import (
    DeviceFacts,
    read_facts,
    read_jetson_linux,
    read_memory,
)
from engines.doctor import (
    Finding,
    examine_bundle,
    examine_machine,
    examine_target,
)
from engines.gpu import Gpu, NoGpu, read_power_mode
from engines.language_packages import find_missing_packages
from engines.targets import find_target
from engines.trt.build_memory import BASE_BYTES, predict_build_bytes
from engines.trt.library import TrtLibrary
from engines.trt.plan import PlanRecord, machine_here, plan_path, write_plan
from tests.small_graph import write_small_bundle

ORIN = DeviceFacts(
    board="NVIDIA Jetson Orin Nano Developer Kit",
    jetson_linux="36.4.3",
    gpu=Gpu("Orin (nvgpu)", 87, 8_000_000_000, True, "12.6", "540.4.0"),
    tensorrt="10.3.0.26",
    tensorrt_problem="",
    compiler=False,
    polygraphy="0.49.26",
    cuda_runtime=True,
    memory_bytes=8_000_000_000,
    available_bytes=5_500_000_000,
    swap_bytes=0,
    disk_bytes=40_000_000_000,
    power_mode="MAXN_SUPER",
)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {item.about: item for item in findings}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(write_small_bundle(tmp_path / "bundle", target="jetson-orin-nano"))


def with_onnx_bytes(bundle: Bundle, size: int) -> Bundle:
    record = bundle.manifest.files["vision.onnx"].model_copy(update={"bytes": size})
    files = {**bundle.manifest.files, "vision.onnx": record}
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"files": files}))


def test_a_ready_orin_has_no_problem(bundle: Bundle) -> None:
    target = find_target("jetson-orin-nano")
    findings = examine_machine(ORIN) + examine_bundle(ORIN, bundle, target)
    assert not [item for item in findings if item.status == "problem"]
    board = by_name(findings)["board"]
    assert "Jetson Linux 36.4.3, JetPack 6.2, power mode MAXN_SUPER" in board.found


def test_an_8_gb_board_that_will_not_make_it(bundle: Bundle) -> None:
    target = find_target("jetson-orin-nano")
    large = with_onnx_bytes(bundle, 1_250_000_000)
    finding = by_name(examine_bundle(ORIN, large, target))["build memory"]
    assert finding.status == "problem"
    assert "to build, 5.5 GB available" in finding.found
    assert "sudo swapon /swapfile" in finding.fix and "multi-user.target" in finding.fix
    swapped = replace(ORIN, swap_bytes=8_000_000_000)
    assert by_name(examine_bundle(swapped, large, target))["build memory"].status == "note"
    half = with_onnx_bytes(bundle, 620_000_000)
    assert by_name(examine_bundle(ORIN, half, target))["build memory"].status == "ok"


def test_prediction_grows_with_the_graph_and_is_never_below_the_base() -> None:
    assert predict_build_bytes(0, 0) == BASE_BYTES
    assert predict_build_bytes(10**9, 0) > predict_build_bytes(10**8, 0)


@pytest.mark.parametrize(
    ("change", "about", "found", "fix"),
    [
        ({"gpu": NoGpu("asleep")}, "device", "no GPU: asleep", "--runtime nvidia"),
        (
            {"gpu": NoGpu("asleep"), "jetson_linux": None, "board": None},
            "device",
            "no GPU: asleep",
            "copy the bundle to a Jetson Orin Nano",
        ),
        (
            {"gpu": Gpu("Thor", 110, 1, True, "13.2", "580.1")},
            "device",
            "this GPU is sm_110, the bundle is for sm_87",
            "--target",
        ),
        (
            {"tensorrt": None, "tensorrt_problem": "no module tensorrt"},
            "TensorRT",
            "no module tensorrt",
            "--system-site-packages",
        ),
        ({"tensorrt": "10.13.3.9"}, "TensorRT", "without kernels for sm_87", "JetPack 6.2 (10.3)"),
        ({"tensorrt": "8.6.2"}, "TensorRT", "needs TensorRT 10.3", "JetPack 7.2 (10.16)"),
        ({"polygraphy": None}, "Polygraphy", "not installed", "foveate[tensorrt]"),
        ({"cuda_runtime": False}, "CUDA runtime", "libcudart", "nvidia-jetpack"),
    ],
)
def test_each_problem_has_its_fix(
    change: dict[str, object], about: str, found: str, fix: str
) -> None:
    facts = replace(ORIN, **change)  # type: ignore[arg-type]
    finding = by_name(examine_target(facts, find_target("jetson-orin-nano")))[about]
    assert finding.status == "problem"
    assert found in finding.found and fix in finding.fix


def test_a_server_without_tensorrt_is_told_to_pip_install() -> None:
    l4 = Gpu("NVIDIA L4", 89, 24_000_000_000, False, "12.8", "570.1")
    server = replace(ORIN, board=None, jetson_linux=None, gpu=l4)
    facts = replace(server, tensorrt=None, tensorrt_problem="none")
    assert by_name(examine_target(facts, find_target("l4")))["TensorRT"].fix.startswith("pip")


def test_away_from_the_device_only_what_concerns_the_device_is_said(bundle: Bundle) -> None:
    desk = replace(
        ORIN, board=None, jetson_linux=None, gpu=NoGpu("none"), tensorrt=None, polygraphy=None
    )
    nano = find_target("jetson-orin-nano")
    assert [item.about for item in examine_target(desk, nano)] == ["device"]
    large = with_onnx_bytes(bundle, 1_250_000_000)
    finding = by_name(examine_bundle(replace(desk, available_bytes=10**11), large, nano))
    memory = finding["build memory"]
    assert memory.status == "problem", "the board builds, not this machine"
    assert "a Jetson Orin Nano 8GB has about 5.2 GB free" in memory.found
    assert "swapon" in memory.fix
    rtx = by_name(examine_target(replace(desk, compiler=True), find_target("rtx-4090")))
    assert rtx["device"].status == "note" and "runs there" in rtx["device"].found


def test_another_gpu_is_offered_its_own_targets() -> None:
    h200 = Gpu("NVIDIA H200", 90, 141_000_000_000, False, "13.0", "580.1")
    device = by_name(examine_target(replace(ORIN, gpu=h200), find_target("jetson-orin")))["device"]
    assert "--target h100 or --target h200" in device.fix
    odd = by_name(
        examine_target(replace(ORIN, gpu=replace(h200, sm=121)), find_target("jetson-orin"))
    )
    assert "sm = 121" in odd["device"].fix


def test_commands_are_printed_in_one_piece(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    nano = find_target("jetson-orin-nano")
    findings = examine_bundle(ORIN, with_onnx_bytes(bundle, 1_250_000_000), nano)
    doctor._print_findings("bundle", findings)
    assert "sudo mkswap /swapfile && sudo swapon /swapfile; also" in capsys.readouterr().out


def test_an_rtx_target_needs_the_compiler() -> None:
    finding = by_name(examine_target(ORIN, find_target("rtx-4090")))["TensorRT-RTX"]
    assert finding.status == "problem" and "engines.install_trt_rtx" in finding.fix


def test_a_slow_power_mode_is_noted() -> None:
    board = by_name(examine_machine(replace(ORIN, power_mode="15W")))["board"]
    assert board.status == "note" and "nvpmodel -m 0" in board.fix


def test_a_plan_of_another_library_is_found(bundle: Bundle) -> None:
    target = find_target("jetson-orin-nano")
    plan = plan_path(bundle, bundle.vision(), target)
    plan.parent.mkdir()
    sha256 = bundle.manifest.files["vision.onnx"].sha256
    assert isinstance(ORIN.gpu, Gpu)
    here = machine_here(sha256, TrtLibrary("tensorrt", None, "10.3.0.26"), target, ORIN.gpu)
    record = PlanRecord(
        onnx_file="vision.onnx",
        onnx_sha256=here.onnx_sha256,
        library=here.library,
        library_version=here.library_version,
        target=target.name,
        precision="fp32",
        sm=here.sm,
        gpu=here.gpu,
        driver=here.driver,
        profile={},
        flags=(),
        workspace_bytes=1,
        build_seconds=1,
        built_at="2026-01-01T00:00:00+00:00",
        foveate="0",
    )
    write_plan(plan, b"plan", record)
    assert by_name(examine_bundle(ORIN, bundle, target))["plan"].status == "ok"
    plan.write_bytes(b"plam")
    assert "damaged or was replaced" in by_name(examine_bundle(ORIN, bundle, target))["plan"].found
    plan.write_bytes(b"plan")
    newer = replace(ORIN, tensorrt="10.16.2.10")
    finding = by_name(examine_bundle(newer, bundle, target))["plan"]
    assert finding.status == "problem"
    assert "the plan has 10.3.0.26, this machine has 10.16.2.10" in finding.found
    assert "--rebuild" in finding.fix
    plan.with_name(f"{plan.name}.json").unlink()
    assert "sidecar" in by_name(examine_bundle(ORIN, bundle, target))["plan"].found


def test_a_cpu_bundle_needs_nothing(tmp_path: Path) -> None:
    opened = open_bundle(write_small_bundle(tmp_path / "cpu"))
    findings = examine_bundle(ORIN, opened, find_target("cpu"))
    assert [item.status for item in findings] == ["ok", "ok", "note"]


def test_system_files_are_read(tmp_path: Path) -> None:
    release = tmp_path / "nv_tegra_release"
    assert read_jetson_linux(release) is None
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    assert read_jetson_linux(release) == "36.4.3"
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        8000 kB\nMemAvailable:    5000 kB\nHugePages_Total: 0\n")
    assert read_memory(meminfo) == {"MemTotal": 8_192_000, "MemAvailable": 5_120_000}
    assert read_memory(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("linux", "jetpack"),
    [
        ("36.4.3", "6.2"),
        ("36.4.4", "6.2.1"),
        ("36.5.0", "6.2.2"),
        ("36.4.0", "6.1"),
        ("38.4.0", "7.1"),
        ("39.2.0", "7.2"),
        ("36.4.99", None),
        (None, None),
    ],
)
def test_jetpack_follows_from_jetson_linux(linux: str | None, jetpack: str | None) -> None:
    assert replace(ORIN, jetson_linux=linux).jetpack == jetpack


def test_power_mode_comes_from_nvpmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_power_mode() is None
    tool = tmp_path / "nvpmodel"
    tool.write_text("#!/bin/sh\necho 'NV Power Mode: MAXN_SUPER'\necho 0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_power_mode() == "MAXN_SUPER"


def test_this_machine_can_be_read() -> None:
    facts = read_facts()
    assert facts.memory_bytes >= facts.available_bytes > 0
    assert facts.disk_bytes > 0


def run_doctor(*arguments: object):
    return CliRunner().invoke(make_app(doctor.main), [str(item) for item in arguments])


def test_command_reports_json_and_ends_with_one_on_a_problem(tmp_path: Path) -> None:
    cpu = write_small_bundle(tmp_path / "cpu")
    fine = run_doctor(cpu, "--json")
    assert fine.exit_code == 0 and json.loads(fine.stdout)["problems"] == 0
    broken = run_doctor(tmp_path / "nowhere", "--json")
    assert broken.exit_code == 1
    sections = json.loads(broken.stdout)["sections"]
    assert "does not exist" in sections[1]["findings"][0]["found"]


def test_a_tampered_graph_is_found(tmp_path: Path) -> None:
    cpu = write_small_bundle(tmp_path / "cpu")
    graph = bytearray((cpu / "vision.onnx").read_bytes())
    graph[100] ^= 1
    (cpu / "vision.onnx").write_bytes(graph)
    told = run_doctor(cpu, "--json")
    assert told.exit_code == 1
    found = json.loads(told.stdout)["sections"][1]["findings"][0]["found"]
    assert "vision.onnx was changed: its SHA-256 is" in found


def test_command_prints_a_table(tmp_path: Path) -> None:
    cpu = write_small_bundle(tmp_path / "cpu")
    result = run_doctor(cpu)
    assert result.exit_code == 0 and "This machine" in result.stdout


def test_a_missing_language_backend_is_a_problem_with_a_command(bundle: Bundle) -> None:
    backend = bundle.manifest.language_models[0].backend
    without = replace(ORIN, missing_backends={backend: "it is not installed"})
    found = by_name(examine_bundle(without, bundle, find_target("jetson-orin-nano")))
    finding = found[f"language backend {backend}"]
    assert (finding.status, finding.found) == ("problem", "it is not installed")
    assert finding.fix.startswith("pip install")


def test_what_a_backend_imports_and_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_packages.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        language_packages,
        "requires",
        lambda package: ["no-such-package>=5.6.1", "numpy", "uvicorn; extra == 'server'"],
    )
    missing = find_missing_packages()
    assert missing["llamacpp"] == "llama-cpp-python is installed, but not no-such-package"
