"""The benchmark of the language backends, at a size that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.llm import Shape, Times, compare, measure, write_random_bundle
from engines.bundle import open_bundle


def test_ratios_are_ours_against_theirs() -> None:
    times = [
        Times("ort", {64: 10.0, 576: 80.0}, 20.0, 900),
        Times("llamacpp", {64: 12.0, 576: 90.0}, 16.0, 800),
        Times("transformers", {64: 40.0, 576: 300.0}, 5.0, 4400),
    ]
    assert compare(times) == {
        "prefill_576_over_64": 8.0,
        "decode_over_llamacpp": 1.25,
        "decode_over_transformers": 4.0,
    }


@pytest.mark.llamacpp
def test_every_backend_can_be_measured(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python: run `make test-llamacpp`")
    bundle = open_bundle(write_random_bundle(tmp_path, Shape(256, 512, 2, 4, 2, 1000)))
    for backend in ("ort", "llamacpp", "transformers"):
        times = measure(bundle, backend, threads=1, answer=4, repeats=1)
        assert times.prefill_ms[576] > times.prefill_ms[64] > 0
        assert times.decode_tokens_per_second > 0
        assert times.peak_memory_mb > 100
