"""The count of memory: each part by hand, what is chosen by default, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines import doctor, estimate
from engines.bundle import Bundle, open_bundle
from engines.cli import make_app
from engines.errors import OptionError
from engines.manifest import DecoderShape, LanguageModel
from engines.memory.check import examine_memory
from engines.memory.context_length import ContextNeed
from engines.memory.decoder import DecoderPlan, decoder_parts, kv_bytes, weight_bits
from engines.memory.of_bundle import MemoryOptions, need_of_bundle, what_would_fit
from engines.memory.of_model import decoder_shape
from engines.memory.process import CUDA_CONTEXT_BYTES
from engines.memory.vision import VisionPlan, vision_parts
from engines.roofline import MODELS
from engines.targets import find_target
from tests.engines.test_doctor import ORIN
from tests.small_graph import write_small_bundle

LLAMA_7B = decoder_shape(MODELS["llava-1.5-7b"])
TINY_LLAMA = decoder_shape(MODELS["tinyllama-1.1b"])


def plan(backend: str = "llamacpp", precision: str = "q4_k_m", **changes: object) -> DecoderPlan:
    return replace(DecoderPlan(backend, precision, 1024), **changes)  # type: ignore[arg-type]


def run(main, *arguments: object):
    return CliRunner().invoke(make_app(main), [str(item) for item in arguments])


@pytest.mark.parametrize(
    ("positions", "expected"), [(4096, 2 * 32 * 4096 * 4096 * 2), (1000, 2 * 32 * 1024 * 4096 * 2)]
)
def test_the_cache_is_of_what_llama_cpp_allocates(positions: int, expected: int) -> None:
    """4096 positions of a 7B are the 2.15 GB that the issue names; others are rounded up."""
    assert kv_bytes(LLAMA_7B, plan(positions=positions)) == expected


def test_a_cache_of_8_bits_has_a_scale_for_32_numbers() -> None:
    half, eight = (kv_bytes(TINY_LLAMA, plan(kv_cache=kind)) for kind in ("f16", "q8"))
    assert eight * 16 == half * 8.5


def test_onnx_runtime_keeps_float32_on_a_cpu_and_float16_on_a_gpu() -> None:
    on_cpu = kv_bytes(TINY_LLAMA, plan("ort", "int4"))
    assert on_cpu == 2 * 22 * 4 * 64 * 1024 * 4
    assert kv_bytes(TINY_LLAMA, plan("ort", "int4", on_gpu=True)) * 2 == on_cpu


def test_weights_of_q4_k_m_are_those_of_a_file_that_was_written() -> None:
    """667,272,544 bytes at TinyLlama's size with 32,064 tokens, 36,937,728 of them the table."""
    shape = TINY_LLAMA.model_copy(update={"vocabulary": 32064})
    counted = weight_bits(shape, "llamacpp", "q4_k_m") / 8
    assert counted == pytest.approx(667_272_544 - 36_937_728, rel=0.003)


def test_onnx_runtime_packs_int4_with_a_sum_for_each_block() -> None:
    given = decoder_parts(TINY_LLAMA, plan("ort", "int4", file_bytes=1_000_000))
    assert given[0].bytes == 1_200_000
    on_gpu = decoder_parts(TINY_LLAMA, plan("ort", "int4", file_bytes=1_000_000, on_gpu=True))
    assert (on_gpu[0].bytes, on_gpu[0].place) == (1_000_000, "gpu")


def test_a_plan_tells_its_own_context_memory() -> None:
    told = vision_parts(VisionPlan("tensorrt", 600, 577, "fp16", context_bytes=123))
    assert {part.name: (part.bytes, part.basis) for part in told}["TensorRT's context memory"] == (
        123,
        "plan",
    )
    guessed = vision_parts(VisionPlan("tensorrt", 600, 577, "fp16"))
    assert [part.basis for part in guessed] == ["counted", "estimate", "estimate"]


@pytest.mark.parametrize(
    ("need", "positions"),
    [
        (ContextNeed(64, exchanges=1), 512),  # 64 + 128 + 256
        (ContextNeed(576, exchanges=1), 1024),  # 960
        (ContextNeed(576), 3840),
        (ContextNeed(64, answer_tokens=10_000, exchanges=1), 4096),  # what it was trained for
        (ContextNeed(64, exchanges=1).with_text("x" * 400, None), 1024),
    ],
)
def test_the_context_is_what_a_question_needs(need: ContextNeed, positions: int) -> None:
    assert need.positions(4096) == positions


def test_a_clip_may_cost_what_one_picture_has_patches() -> None:
    assert ContextNeed(clip_frames=8).with_visual_tokens(64, 576).visual_tokens == 576
    assert ContextNeed(100, clip_frames=8).with_visual_tokens(64, 576).visual_tokens == 100
    assert ContextNeed().with_visual_tokens(64, 576).visual_tokens == 64


def with_shape(
    bundle: Bundle, *backends: LanguageModel, decoder_bytes: int = 3_900_000_000
) -> Bundle:
    """The bundle as if it held decoders of a 7B."""
    manifest = bundle.manifest
    text = manifest.text.model_copy(
        update={"decoder": DecoderShape(**LLAMA_7B.model_dump()), "context_length": 4096}
    )
    record = manifest.files["decoder/model.onnx"].model_copy(update={"bytes": decoder_bytes})
    files = {**manifest.files, "decoder/model.onnx": record}
    models = backends or (
        LanguageModel(backend="llamacpp", file="decoder/model.onnx", precision="q4_k_m"),
    )
    changes = {"text": text, "files": files, "language_models": models}
    return replace(bundle, manifest=manifest.model_copy(update=changes))


@pytest.fixture
def nano(tmp_path: Path) -> Bundle:
    opened = open_bundle(write_small_bundle(tmp_path / "bundle", target="jetson-orin-nano"))
    return with_shape(opened)


def test_a_jetson_counts_host_and_gpu_together(nano: Bundle) -> None:
    target = find_target("jetson-orin-nano")
    need = need_of_bundle(nano, target, MemoryOptions())
    assert need is not None
    assert need.total_bytes == need.bytes_on("host") + need.bytes_on("gpu")
    assert CUDA_CONTEXT_BYTES in [part.bytes for part in need.parts]
    fits = examine_memory(ORIN, nano, target, MemoryOptions())
    assert fits.status == "ok" and "5.5 GB free" in fits.found
    whole = examine_memory(ORIN, nano, target, MemoryOptions(context=4096))
    assert whole.status == "problem"
    assert "2.15 KV cache, 4096 positions" in whole.found
    assert "--context 512" in whole.fix and "--kv-cache q8" not in whole.fix


def test_eight_bits_are_offered_where_they_suffice(nano: Bundle) -> None:
    target = find_target("jetson-orin-nano")
    asked = MemoryOptions(context=2048)
    offered = what_would_fit(nano, target, asked, 5.4e9)
    assert any(words.startswith("--kv-cache q8") for words in offered)
    assert what_would_fit(nano, target, asked, 1e9) == []


def test_a_desk_judges_by_the_target(nano: Bundle) -> None:
    from engines.gpu import NoGpu

    desk = replace(ORIN, board=None, jetson_linux=None, gpu=NoGpu("none"), available_bytes=10**12)
    found = examine_memory(desk, nano, find_target("jetson-orin-nano"), MemoryOptions(context=4096))
    assert found.status == "problem"
    assert "a Jetson Orin Nano 8GB has about 5.2 GB free" in found.found


def test_an_older_bundle_says_that_it_is_not_counted(tmp_path: Path) -> None:
    old = open_bundle(write_small_bundle(tmp_path / "cpu"))
    found = examine_memory(ORIN, old, find_target("cpu"), MemoryOptions())
    assert found.status == "note" and "build the bundle again" in found.fix


def test_onnx_runtime_has_no_cache_of_8_bits(nano: Bundle) -> None:
    onnx = LanguageModel(backend="ort", file="decoder/model.onnx", precision="int4")
    with pytest.raises(OptionError, match=r"only llama\.cpp has it.*decoder for ort"):
        need_of_bundle(with_shape(nano, onnx), find_target("cpu"), MemoryOptions(kv_cache="q8"))


def test_doctor_ends_with_1_where_the_context_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nano: Bundle
) -> None:
    monkeypatch.setattr(doctor, "open_bundle", lambda path: nano)
    monkeypatch.setattr(doctor, "read_facts", lambda place: ORIN)
    told = run(doctor.main, tmp_path, "--context", 4096, "--json")
    assert told.exit_code == 1
    findings = json.loads(told.stdout)["sections"][1]["findings"]
    (memory,) = [item for item in findings if item["about"] == "memory"]
    assert memory["status"] == "problem" and "--context 512" in memory["fix"]
    fits = json.loads(run(doctor.main, tmp_path, "--json").stdout)["sections"][1]["findings"]
    assert [item["status"] for item in fits if item["about"] == "memory"] == ["ok"]


def test_estimate_counts_the_context_that_is_asked_for() -> None:
    def found(*arguments: object) -> dict[str, object]:
        result = run(estimate.main, "--target", "jetson-orin-nano", "--json", *arguments)
        assert result.exit_code == 0, result.stderr
        document: dict[str, object] = json.loads(result.stdout)
        return document

    whole, short = found("--context", 4096), found()
    assert (whole["context"], short["context"]) == (4096, 256)
    sizes = {part["name"].split(",")[0]: part["bytes"] for part in whole["memory"]}  # type: ignore[attr-defined]
    assert sizes["KV cache"] == 2 * 32 * 4096 * 4096 * 2
    assert whole["fits"] is False
    assert found("--context", 4096, "--kv-cache", "q8")["needed_bytes"] < whole["needed_bytes"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--backend", "vllm"), "there is no such decoder"),
        (("--backend", "ort", "--llm-precision", "fp16"), "ort: int4"),
        (("--backend", "ort", "--kv-cache", "q8"), "for --backend llamacpp only"),
    ],
)
def test_estimate_refuses_what_nobody_runs(arguments: tuple[str, ...], expected: str) -> None:
    result = run(estimate.main, *arguments)
    assert result.exit_code == 2 and expected in result.stderr
