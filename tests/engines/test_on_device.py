"""The script a bundle carries, run with a trtexec that writes down how it was called."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from engines.bundle import open_bundle, write_bundle
from engines.manifest import Manifest, VisionFiles
from engines.targets import find_target
from engines.trt.batch_profile import ONE_IMAGE
from engines.trt.on_device import PAGE_NAME, SCRIPT_NAME, make_page, write_device_files
from tests.small_graph import write_small_bundle

TRTEXEC = """#!/bin/sh
for word; do echo "$word"; done >> called
"""


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A folder with what a bundle of two graphs carries for a Jetson."""
    bundle = open_bundle(write_small_bundle(tmp_path / "bundle"))
    folder = tmp_path / "on device"
    folder.mkdir()
    first = bundle.vision()
    graphs = (first, first.model_copy(update={"file": "vision/few.onnx"}))
    files = VisionFiles(graphs=graphs)
    written = write_device_files(folder, files, find_target("jetson-orin"), ONE_IMAGE)
    assert written == (SCRIPT_NAME, PAGE_NAME)
    return folder


def run_script(
    folder: Path, *arguments: str, trtexec: bool = False
) -> subprocess.CompletedProcess[str]:
    path = "/usr/bin:/bin"
    if trtexec:
        tools = folder / "tools"
        tools.mkdir(exist_ok=True)
        tool = tools / "trtexec"
        tool.write_text(TRTEXEC)
        tool.chmod(0o755)
        path = f"{tools}:{path}"
    return subprocess.run(
        [folder / SCRIPT_NAME, *arguments],
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )


def test_the_trtexec_call_of_each_graph(device: Path) -> None:
    done = run_script(device, "--trtexec", trtexec=True)
    assert done.returncode == 0, done.stderr
    calls = (device / "called").read_text().split("--onnx=")
    assert calls[0] == "" and len(calls) == 3
    assert calls[1].splitlines() == [
        "vision.onnx",
        "--saveEngine=local/vision-tensorrt-sm87.plan.trtexec",
        "--stronglyTyped",
        "--noTF32",
        "--minShapes=pixel_values:1x3x8x8",
        "--optShapes=pixel_values:1x3x8x8",
        "--maxShapes=pixel_values:1x3x8x8",
        "--memPoolSize=workspace:4096",
        "--profilingVerbosity=detailed",
        "--timingCacheFile=local/trtexec.cache",
        "--skipInference",
    ]
    assert calls[2] == calls[1].replace("vision.onnx", "vision/few.onnx").replace(
        "local/vision-", "local/few-"
    )


def test_foveates_own_builder_builds_every_graph(device: Path) -> None:
    tools = device / "tools"
    tools.mkdir()
    python = tools / "python3"
    python.write_text('#!/bin/sh\necho "$@" >> called\n')
    python.chmod(0o755)
    assert run_script(device, trtexec=True).returncode == 0
    assert (device / "called").read_text().splitlines()[1:] == [
        "-m engines.doctor .",
        "-m engines.build . --target jetson-orin",
    ]


def test_the_call_is_printed_where_there_is_no_trtexec(device: Path) -> None:
    done = run_script(device, "--print")
    assert done.returncode == 0
    first, second = done.stdout.splitlines()
    assert first.startswith("/usr/src/tensorrt/bin/trtexec --onnx=vision.onnx")
    assert "--onnx=vision/few.onnx" in second and "--stronglyTyped" in second


def test_what_is_missing_is_said(device: Path) -> None:
    done = run_script(device, "--trtexec")
    assert done.returncode == 2 and "sudo apt install libnvinfer-bin" in done.stderr
    done = run_script(device)
    assert done.returncode == 2 and "pip install 'foveate[tensorrt]'" in done.stderr


def test_an_unknown_option_shows_the_help(device: Path) -> None:
    done = run_script(device, "--help")
    assert done.returncode == 2 and "--trtexec" in done.stdout


def test_no_placeholder_is_left(device: Path) -> None:
    text = (device / SCRIPT_NAME).read_text() + (device / PAGE_NAME).read_text()
    assert "@" not in text.replace('"$@"', "").replace("[@]", "")


def test_the_page_names_the_releases_that_work() -> None:
    target = find_target("jetson-orin")
    graph = _graph()
    page = make_page(VisionFiles(graphs=(graph,)), target)
    assert "JetPack 6.2 (TensorRT 10.3)" in page
    assert "TensorRT 10.13 was shipped without kernels for sm_87" in page
    assert "built on the Jetson AGX Orin" in page


def _graph():
    from tests.tiny_bundle import tiny_manifest

    return Manifest.model_validate(tiny_manifest()).vision[0]


def test_a_fixed_batch_needs_no_shapes(tmp_path: Path) -> None:
    graph = _graph()
    fixed = graph.inputs[0].model_copy(update={"shape": (1, 3, 8, 8)})
    graph = graph.model_copy(update={"inputs": (fixed,)})
    write_device_files(tmp_path, VisionFiles(graphs=(graph,)), find_target("l4"))
    done = run_script(tmp_path, "--print")
    assert "Shapes" not in done.stdout and "--noTF32" in done.stdout


@pytest.mark.parametrize("target", ["cpu", "x86", "rtx-4090"])
def test_a_bundle_that_is_not_built_on_its_device_carries_nothing(
    tmp_path: Path, target: str
) -> None:
    files = VisionFiles(graphs=(_graph(),))
    assert write_device_files(tmp_path, files, find_target(target)) == ()
    assert not list(tmp_path.iterdir())


def test_a_bundle_with_the_files_opens(tmp_path: Path) -> None:
    from tests.tiny_bundle import tiny_manifest

    manifest = Manifest.model_validate(tiny_manifest(target="jetson-orin"))
    with write_bundle(tmp_path / "bundle") as draft:
        for name in (
            "vision.onnx",
            "embeddings.safetensors",
            "tokenizer.json",
            "decoder/model.onnx",
        ):
            draft.path(name).write_text(name)
        write_device_files(draft.root, manifest.vision_files, find_target("jetson-orin"))
        draft.describe(manifest)
    bundle = open_bundle(tmp_path / "bundle")
    assert SCRIPT_NAME in bundle.manifest.files
    assert bundle.path(SCRIPT_NAME).stat().st_mode & 0o111
