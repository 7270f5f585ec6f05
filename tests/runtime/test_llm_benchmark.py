"""The benchmark of the language backends, at a size that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.llm import Round, Times, compare, measure
from benchmarks.random_language_model import Shape, write_random_bundle
from engines.bundle import open_bundle


def times_of(backend: str, *rounds: tuple[float, float, float]) -> Times:
    """Rounds of (prefill of 64, of 576, tokens per second)."""
    return Times(
        backend,
        tuple(Round({64: a, 576: b}, {64: a, 576: b}, c, 1.0, 900.0) for a, b, c in rounds),
    )


def test_ratios_are_those_of_one_round() -> None:
    """In the second round everything was three times as slow, in the third ours alone."""
    times = [
        times_of("ort", (10.0, 80.0, 20.0), (30.0, 240.0, 6.0), (90.0, 720.0, 5.0)),
        times_of("llamacpp", (12.0, 90.0, 16.0), (36.0, 270.0, 4.8), (12.0, 90.0, 16.0)),
        times_of("openvino", (4.0, 20.0, 30.0), (12.0, 60.0, 9.0), (12.0, 60.0, 7.5)),
        times_of("transformers-bf16", (5.0, 18.0, 5.0), (15.0, 54.0, 2.0), (15.0, 54.0, 2.0)),
    ]
    assert compare(times) == {
        "prefill_576_over_64": 8.0,
        "decode_ort_over_llamacpp": 1.25,
        "prefill_64_openvino_over_transformers-bf16": 1.25,
        "prefill_576_openvino_over_transformers-bf16": 0.9,
        "decode_openvino_over_ort": 1.5,
    }
    assert (times[0].prefill_ms(576), times[0].decode_tokens_per_second) == (80.0, 6.0)


@pytest.mark.llamacpp
def test_every_backend_can_be_measured(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python: run `make test-llamacpp`")
    bundle = open_bundle(write_random_bundle(tmp_path, Shape(256, 512, 2, 4, 2, 1000)))
    for backend in ("ort", "llamacpp", "openvino", "transformers", "transformers-bf16"):
        times = next(measure(bundle, backend, threads=1, answer=4))
        assert times.prefill_ms[576] > times.prefill_ms[64] > 0
        assert times.decode_tokens_per_second > 0
        assert times.peak_memory_mb > 100
    assert open_bundle(tmp_path / "bundle-int8").language_model("openvino").precision == "int8"
