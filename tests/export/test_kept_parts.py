"""A build that was stopped goes on: finished parts are used again, and only the same build's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import open_bundle
from export.build import BuildOptions, build_bundle
from export.build import steps as build_steps
from export.build import vision as build_vision
from export.checkpoint.llava import open_checkpoint
from export.kept_parts import KeptParts


@pytest.fixture
def stopped(
    language_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> BuildOptions:
    """Options of a build that was stopped after its vision graph."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    options = BuildOptions(str(language_checkpoint), tmp_path / "bundle", tokens=(4,))
    with monkeypatch.context() as patch:
        patch.setattr(build_steps, "export_language_models", stop)
        with pytest.raises(KeyboardInterrupt):
            build_bundle(options)
    return options


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the reducers whose graphs are traced."""
    names: list[str] = []
    original: Callable[..., Any] = build_vision.build_vision_module

    def noted(checkpoint: Any, reducer: Any, *rest: Any) -> Any:
        names.append(reducer.name)
        return original(checkpoint, reducer, *rest)

    monkeypatch.setattr(build_vision, "build_vision_module", noted)
    return names


def test_the_same_build_goes_on(stopped: BuildOptions, traced: list[str]) -> None:
    assert [f.name for f in stopped.out.parent.iterdir()] == ["bundle.unfinished"]
    build_bundle(stopped)
    assert traced == []
    assert [f.name for f in stopped.out.parent.iterdir()] == ["bundle"]
    (graph,) = open_bundle(stopped.out).manifest.vision
    assert graph.reducer.tokens == 4


def test_another_budget_is_built_anew(stopped: BuildOptions, traced: list[str]) -> None:
    build_bundle(replace(stopped, tokens=(8,)))
    assert traced == ["visionzip"]
    assert [f.name for f in stopped.out.parent.iterdir()] == ["bundle"]


def test_another_checkpoint_is_built_anew(language_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(language_checkpoint)
    (tmp_path / "a").write_text("1")
    kept = KeptParts(tmp_path / "bundle", checkpoint)
    kept.keep("part", {"x": 1}, tmp_path, ["a"], [1, "b"])
    assert kept.restore("part", {"x": 1}, tmp_path / "root") == [1, "b"]
    assert (tmp_path / "root" / "a").read_text() == "1"
    (file,) = checkpoint.root.glob("*.safetensors")
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    try:
        changed = KeptParts(tmp_path / "bundle", checkpoint)
        assert changed.restore("part", {"x": 1}, tmp_path / "other") is None
        assert not (kept.folder / "part").exists()
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
