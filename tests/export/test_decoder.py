"""The decoder export: every family against transformers, and every reason it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from transformers import LlavaForConditionalGeneration

from engines.bundle import Bundle
from engines.errors import BackendError, CheckpointError, OptionError
from export.checkpoint.llava import open_checkpoint
from export.language import onnx_decoder as decoder_module
from export.language.causal_lm import read_limits
from export.language.onnx_decoder import export_language, write_decoder
from export.language.position_input import add_position_input
from runtime.backends.ort import open_ort_backend
from tests.tiny_language import (
    tiny_llava,
    without_positions,
    write_checkpoint,
    write_language_bundle,
)

IDS = np.random.default_rng(0).integers(5, 300, 40)


def logits_of(model: LlavaForConditionalGeneration) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS[None])).logits[0, -1].numpy()


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# As many rows as the gate has, by which the builder would take the gate for a head.
HEAD_LIKE_GATE = {"vocab_size": 320, "intermediate_size": 320}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", HEAD_LIKE_GATE),
        ("qwen3", {"tie_word_embeddings": True}),
        (
            "llama",
            {**HEAD_LIKE_GATE, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        ),
        pytest.param("mistral", {"sliding_window": None}, marks=pytest.mark.slow),
    ],
)
def test_fp32_decoder_equals_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model = tiny_llava(family, **changes)
    bundle = write_language_bundle(
        tmp_path / "bundle", write_checkpoint(tmp_path / "checkpoint", model)
    )
    logits = open_ort_backend(bundle, threads=1).prefill([IDS])
    np.testing.assert_allclose(logits, logits_of(model), atol=2e-5)
    assert len(logits) == model.config.text_config.vocab_size


def test_positions_cost_nothing_where_they_are_consecutive(
    language_bundle: Bundle, tmp_path: Path
) -> None:
    """Without the input the graph is the builder's, as in older bundles: the same logits."""
    older = without_positions(language_bundle, tmp_path / "older")
    ours, theirs = (open_ort_backend(one, threads=1) for one in (language_bundle, older))
    assert (ours.capabilities.positions, theirs.capabilities.positions) == (True, False)
    for part in (IDS, IDS[:1], IDS[7:20]):
        assert np.array_equal(ours.prefill([part]), theirs.prefill([part]))
    with pytest.raises(BackendError, match='"ort" takes consecutive positions only'):
        theirs.prefill([IDS[:2]], np.array([54, 60]))


def test_an_attention_without_rotation_tables_is_no_decoder_of_ours() -> None:
    node = onnx.helper.make_node("GroupQueryAttention", ["q", "k", "v"], ["o"], domain="x")
    graph = onnx.helper.make_graph([node], "graph", [], [])
    with pytest.raises(RuntimeError, match="0 of the decoder's 1 attentions have rotation tables"):
        add_position_input(onnx.helper.make_model(graph))


def test_int4_decoder_equals_transformers_with_its_weights(
    tmp_path: Path, language_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What INT4 changes is the weights (in blocks of 32) and, a little, the activations (INT8)."""
    counted: list[tuple[int, int]] = []
    bundle = write_language_bundle(
        tmp_path / "bundle",
        language_checkpoint,
        "int4",
        progress=lambda done, total: counted.append((done, total)),
    )
    weights_bytes = (bundle.root / "llm/ort/model.onnx.data").stat().st_size
    done, totals = zip(*counted, strict=True)
    assert set(totals) == {weights_bytes}
    assert list(done) == sorted(done)
    assert done[-1] == weights_bytes
    assert capfd.readouterr().out == ""  # the builder's own prints are not ours
    logits = open_ort_backend(bundle, threads=1).prefill([IDS])
    model = tiny_llava()
    untouched = logits_of(model)
    errors = put_weights(model, dequantized_weights(bundle))
    expected = logits_of(model)
    assert len(errors) == 2 * 7 + 1
    assert max(errors) < 0.12
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()
    assert np.abs(logits - expected).max() < 0.2 * np.abs(logits - untouched).max()


def dequantized_weights(bundle: Bundle) -> dict[str, np.ndarray]:
    graph = onnx.load(str(bundle.root / "llm/ort/model.onnx")).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            packed, scales = arrays[node.input[1]], arrays[node.input[2]]
            values = np.stack([packed & 15, packed >> 4], -1).reshape(sizes["N"], -1, 32)
            rows = (values.astype(np.float32) - 8) * scales.reshape(sizes["N"], -1, 1)
            weights[node.name] = rows.reshape(sizes["N"], -1)[:, : sizes["K"]]
    return weights


def put_weights(
    model: LlavaForConditionalGeneration, weights: dict[str, np.ndarray]
) -> list[float]:
    """Give the model these weights and return how far each was from its own."""
    layers = {"/lm_head/MatMul_Q4": [model.lm_head]}
    for index, layer in enumerate(model.model.language_model.layers):
        name, attention = f"/model/layers.{index}", layer.self_attn
        layers[f"{name}/attn/qkv_proj/MatMul_Q4"] = [
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
        ]
        layers[f"{name}/attn/o_proj/MatMul_Q4"] = [attention.o_proj]
        for kind in ("gate", "up", "down"):
            layers[f"{name}/mlp/{kind}_proj/MatMul_Q4"] = [getattr(layer.mlp, f"{kind}_proj")]
    errors = []
    for name, linears in layers.items():
        cuts = np.cumsum([linear.out_features for linear in linears])[:-1]
        for linear, rows in zip(linears, np.split(weights[name], cuts), strict=True):
            new = torch.from_numpy(rows.copy())
            errors.append(((linear.weight - new).norm() / new.norm()).item())
            linear.weight.data = new
    return errors


def test_what_is_written_and_said(language_bundle: Bundle) -> None:
    manifest = language_bundle.manifest
    assert manifest.language_models[0].model_dump() == {
        "backend": "ort",
        "file": "llm/ort/model.onnx",
        "precision": "fp32",
        "device": "cpu",
    }
    assert (manifest.text.vocabulary, manifest.text.hidden_size) == (304, 64)
    assert manifest.text.context_length == 1024
    assert manifest.prompt.stop_token_ids == (2,)
    written = {
        str(f.relative_to(language_bundle.root))
        for f in language_bundle.root.rglob("llm/**/*")
        if f.is_file()
    }
    assert written == {
        "llm/embeddings.safetensors",
        "llm/tokenizer.json",
        "llm/ort/model.onnx",
        "llm/ort/model.onnx.data",
    }


def test_limits_are_told_together(language_checkpoint: Path) -> None:
    config = open_checkpoint(language_checkpoint).text_config
    assert read_limits(config) == []
    config.model_type = "gemma"
    config.rope_parameters = {"rope_type": "yarn"}
    config.layer_types = ["sliding_attention"]
    config.head_dim = 20
    problems = "; ".join(read_limits(config))
    for part in ("'gemma', not one of llama", "'yarn'", "sliding window", "20 wide"):
        assert part in problems


def test_a_language_model_that_cannot_be_exported(
    tmp_path: Path, language_checkpoint: Path
) -> None:
    checkpoint = open_checkpoint(language_checkpoint)
    checkpoint.text_config.head_dim = 12
    with pytest.raises(CheckpointError, match=r"config.json.*heads are 12 wide.*multiples of 16"):
        export_language(checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())


def test_fp32_is_refused_on_a_gpu(tmp_path: Path, language_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="fp32 decoder runs on the CPU only"):
        export_language(open_checkpoint(language_checkpoint), tmp_path, "fp32", device="cuda")


def test_embeddings_too_large_for_float16(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "checkpoint", tiny_llava())
    file = root / "model.safetensors"
    tensors = {name: value.astype(np.float32) for name, value in load_file(file).items()}
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][3, 3] = 7e4
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="numbers up to 70000, and float16 ends at 65504"):
        export_language(open_checkpoint(root), tmp_path / "out")


def test_a_builder_that_fails_is_quoted(
    tmp_path: Path, language_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(language_checkpoint)
    monkeypatch.setattr(decoder_module, "write_causal_lm", lambda _, directory: directory.mkdir())
    with pytest.raises(CheckpointError, match=r"(?s)model builder could not build.*config"):
        write_decoder(checkpoint, tmp_path, "fp32")
    assert not list(tmp_path.glob(".decoder-*"))


def test_a_builder_that_is_not_installed(
    tmp_path: Path, language_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r'pip install "foveate\[export\]"'):
        write_decoder(open_checkpoint(language_checkpoint), tmp_path, "fp32")


def test_the_tokenizer_is_the_one_transformers_uses(
    language_bundle: Bundle, language_checkpoint: Path
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    ours = Tokenizer.from_file(str(language_bundle.root / "llm/tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(language_checkpoint)
    text = "USER: <image>\nWhat is 日本? </s> ASSISTANT:"
    assert ours.encode(text).ids == theirs(text).input_ids
    assert json.loads(ours.to_str())["truncation"] is None
