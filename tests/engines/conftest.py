"""What the tests of engines share: a key of their own, and NVIDIA's compiler where it is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from engines.trt.compiler_cache import add_compiler_to_path


@pytest.fixture(autouse=True)
def own_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sign plans with a key of the test's, not the user's."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skip where NVIDIA's parser and builder are not installed."""
    if importlib.util.find_spec("polygraphy") is None:
        pytest.skip("polygraphy is not installed: pip install 'foveate[tensorrt]'")
    if not add_compiler_to_path():
        pytest.skip("NVIDIA's compiler is not installed: python -m engines.install_trt_rtx")
