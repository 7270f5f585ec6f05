"""Inspecting a bundle: what it holds, for people and for machines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engines.trt.plan import PlanRecord, write_plan
from tests.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


def inspect(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engines.inspect", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )


def test_the_page_says_what_it_holds_and_what_to_do_next(bundle: Path) -> None:
    told = inspect(bundle)
    assert told.returncode == 0, told.stderr
    assert "visionzip: 2 visual tokens from 4 patches, fp32, opset 18" in told.stdout
    assert "decoder/model.onnx  fp32, backend ort, context 32" in told.stdout
    assert "SHA-256 of every file is as built" in told.stdout
    assert f"python -m runtime.ask {bundle} picture.jpg" in told.stdout


def test_json_is_one_object(bundle: Path) -> None:
    said = json.loads(inspect(bundle, "--json", "--trust").stdout)
    assert said["model"] == "tiny"
    assert said["verified"] is False
    assert said["vision"][0]["visual_tokens"] == 2
    assert said["bytes"]["tokenizer.json"] == len("tokenizer.json")


def test_a_damaged_bundle_ends_with_2(bundle: Path, tmp_path: Path) -> None:
    told = inspect(write_tiny_bundle(tmp_path / "t") / "..", "--json")
    assert (told.returncode, told.stdout) == (2, "")
    (tmp_path / "t/tokenizer.json").write_text("tokenizer.jsoN")
    told = inspect(tmp_path / "t", "--json")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("error: ")
    assert "tokenizer.json was changed" in told.stderr
    assert told.stderr.count("\n") == 1


def test_the_engines_that_were_built_are_listed(tmp_path: Path) -> None:
    place = write_tiny_bundle(tmp_path / "tiny")
    assert "Engines built here" not in inspect(place).stdout
    plan = place / "local/vision-tensorrt-sm87.plan"
    plan.parent.mkdir()
    record = PlanRecord(
        onnx_file="vision.onnx",
        onnx_sha256="ab" * 32,
        library="tensorrt",
        library_version="10.3.0.26",
        target="jetson-orin",
        precision="fp16",
        sm=87,
        gpu="Orin",
        driver="540.4.0",
        profile={},
        flags=(),
        workspace_bytes=1,
        build_seconds=1,
        built_at="2026-01-01T00:00:00+00:00",
        foveate="0",
    )
    write_plan(plan, b"plan", record)
    plan.with_name("damaged.plan").write_bytes(b"")
    told = inspect(place).stdout
    assert "  vision-tensorrt-sm87.plan  tensorrt 10.3.0.26, sm_87, fp16, 0.0 MB, 2026-01" in told
    said = json.loads(inspect(place, "--json").stdout)
    assert list(said["plans"]) == ["vision-tensorrt-sm87.plan"]
    assert said["plans"]["vision-tensorrt-sm87.plan"]["driver"] == "540.4.0"
