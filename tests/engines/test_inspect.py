"""Inspecting a bundle: what it holds, for people and for machines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
