"""Decoders for the backends asked for, and the refusals that come before anything slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import open_bundle
from engines.errors import CheckpointError, FoveateError, OptionError
from export.build import build_bundle
from export.build.plan import BuildOptions, plan_build
from export.language import language_models
from export.language.language_models import DecoderOptions
from runtime.model import open_model
from tests.tiny_language import tiny_llava, write_checkpoint


def test_a_bundle_for_llama_cpp_alone_has_what_every_backend_shares(
    language_checkpoint: Path, tmp_path: Path
) -> None:
    options = BuildOptions(
        str(language_checkpoint),
        tmp_path / "bundle",
        tokens=(8,),
        decoders=DecoderOptions(("llamacpp",), gguf_precision="f16"),
    )
    report = build_bundle(options)
    assert report.notes == ()
    bundle = open_bundle(tmp_path / "bundle")
    model = bundle.language_model()
    assert (model.backend, model.precision) == ("llamacpp", "f16")
    assert bundle.manifest.text.vocabulary == 304
    files = {file.name for file in (bundle.root / "llm").rglob("*") if file.is_file()}
    assert files == {"embeddings.safetensors", "tokenizer.json", "model-f16.gguf"}


@pytest.mark.parametrize(
    ("precision", "gguf_precision", "chosen"),
    [
        ("int4", None, "q4_k_m"),
        ("fp32", None, "f16"),
        ("int4", "q8_0", "q8_0"),
        ("int8", None, "q8_0"),
    ],
)
def test_the_gguf_precision_follows_the_other(precision, gguf_precision, chosen: str) -> None:
    options = DecoderOptions(("ort", "llamacpp"), precision, gguf_precision)
    assert options.precision_of("ort") == precision
    assert options.precision_of("llamacpp") == chosen


@pytest.mark.parametrize("backends", [(), ("ort", "ort")])
def test_backends_are_named_once(language_checkpoint: Path, tmp_path: Path, backends) -> None:
    options = BuildOptions(
        str(language_checkpoint), tmp_path / "b", decoders=DecoderOptions(backends)
    )
    with pytest.raises(OptionError, match="expected ort, llamacpp or openvino, each once"):
        plan_build(options)


def test_a_missing_quantizer_is_told_before_anything_slow(
    language_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_models, "find_spec", lambda name: None)
    decoders = DecoderOptions(("llamacpp",))
    options = BuildOptions(str(language_checkpoint), tmp_path / "b", decoders=decoders)
    with pytest.raises(OptionError, match=r"q4_k_m needs llama-cpp-python.*--gguf-precision f16"):
        plan_build(options)


def test_a_model_llama_cpp_cannot_run_is_told_before_anything_slow(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_llava("llama", hidden_act="gelu"))
    decoders = DecoderOptions(("ort", "llamacpp"))
    options = BuildOptions(str(checkpoint), tmp_path / "b", decoders=decoders)
    with pytest.raises(CheckpointError, match=r"hidden_act is 'gelu'.*--llm-backend ort"):
        plan_build(options)


@pytest.mark.llamacpp
def test_both_backends_answer_alike(language_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python: run `make test-llamacpp`")
    options = BuildOptions(
        str(language_checkpoint),
        tmp_path / "bundle",
        tokens=(8,),
        decoders=DecoderOptions(("llamacpp", "ort"), "fp32", "f32"),
    )
    build_bundle(options)
    bundle = open_bundle(tmp_path / "bundle")
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    answers = []
    for backend in (None, "ort"):
        with open_model(bundle, backend=backend, threads=1) as model:
            answers.append(model.ask(picture, "What is this?").text)
    assert answers[0] == answers[1] != ""
    with pytest.raises(FoveateError, match="expected one of ort, llamacpp"):
        open_model(bundle, backend="llama.cpp")


def test_openvino_and_onnx_runtime_share_one_decoder(
    language_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    options = BuildOptions(
        str(language_checkpoint),
        tmp_path / "bundle",
        tokens=(8,),
        decoders=DecoderOptions(("openvino", "ort"), "int8"),
    )
    plan = plan_build(options)
    alone = plan_build(replace(options, decoders=DecoderOptions(("ort",), "int8")))
    assert plan.cost.bundle_bytes == alone.cost.bundle_bytes
    build_bundle(options)
    bundle = open_bundle(tmp_path / "bundle")
    models = bundle.manifest.language_models
    assert [(m.backend, m.precision) for m in models] == [("openvino", "int8"), ("ort", "int8")]
    assert models[0].file == models[1].file
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    with open_model(bundle, threads=1) as model:
        answer = model.ask(picture, "What is this?")
    assert answer.backend == "openvino"
    assert answer.text
