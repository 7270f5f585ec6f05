"""Each program of `examples/` runs as its first line says, and needs the public API alone."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.bundle import Bundle, open_bundle
from examples import ask, batch_to_numpy, camera_loop, own_reducer
from export.reducers import REDUCERS
from runtime.vision import VisionEncoder
from runtime.vision.pictures import load_picture
from tests.photographs import load_photographs

REDUCERS.pop(own_reducer.Looked.name)  # other tests of this process go through all reducers

ROOT = Path(__file__).parents[1]
PUBLIC = {"calibration", "engines", "export", "runtime"} | {
    *("export.reducers", "export.reducers.selection", "export.towers"),  # a reducer of one's own
}
QUESTION = "What is in the picture?"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("astronaut.png", "coffee.png"):
        Image.fromarray(load_photographs()[name]).save(folder / name)
    return folder


@pytest.mark.parametrize("program", sorted((ROOT / "examples").glob("*.py")), ids=lambda f: f.stem)
def test_it_imports_only_what_is_public(program: Path) -> None:
    nodes = ast.walk(ast.parse(program.read_text("utf-8")))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {name for name in modules if name.split(".")[0] in {*PUBLIC, "graphs", "benchmarks"}}
    assert ours <= PUBLIC


def test_ask(language_bundle: Bundle, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask.main(str(language_bundle.root), str(pictures / "coffee.png"), QUESTION, "Which colour?")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(QUESTION)
    assert lines[-1].startswith("  16 visual tokens, ")


def test_camera_loop(
    language_bundle: Bundle, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    camera_loop.main(str(language_bundle.root), str(pictures), QUESTION)
    assert " ms ago)" in capsys.readouterr().out


def test_batch_to_numpy(language_bundle: Bundle, pictures: Path, tmp_path: Path) -> None:
    files = sorted(pictures.iterdir())
    batch_to_numpy.main(str(language_bundle.root), str(tmp_path / "t.npz"), *map(str, files))
    with VisionEncoder(language_bundle) as encoder, np.load(tmp_path / "t.npz") as saved:
        expected = encoder.encode([load_picture(file) for file in files])
        np.testing.assert_array_equal(saved["tokens"], expected.tokens)
        np.testing.assert_array_equal(saved["origin"], expected.origin)


def test_own_reducer(
    tmp_path: Path,
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its bundle answers; the patches it keeps are those with the highest scores."""
    monkeypatch.setitem(REDUCERS, own_reducer.Looked.name, own_reducer.Looked)
    own_reducer.main(str(ROOT / "models/pocket-llava"), str(tmp_path / "own"))
    bundle = open_bundle(tmp_path / "own")
    assert [graph.reducer.tokens for graph in bundle.manifest.vision] == [64, 32]
    assert "MB" in capsys.readouterr().out
    picture = load_picture(pictures / "coffee.png")
    kept = []
    for tokens in (64, 32):
        with VisionEncoder(bundle, tokens=tokens) as encoder:
            kept.append(set(encoder.encode([picture]).origin[0].tolist()))
    assert [len(patches) for patches in kept] == [64, 32]
    assert kept[1] < kept[0]
    assert json.loads((tmp_path / "own/bundle.json").read_text())["vision"][0]["reducer"] == {
        "name": "looked",
        "tokens": 64,
        "options": {"budget": 64},
    }
