"""GGUF files of every family against transformers, and what cannot become one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.errors import CheckpointError
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.language.gguf_decoder import read_gguf_limits, write_gguf
from export.language.gguf_quantize import Fallback, export_gguf, read_fallbacks
from runtime.backends.llama_decoder import LlamaDecoder
from runtime.backends.llamacpp import LlamaCppBackend
from runtime.language.embeddings import EmbeddingTable
from tests.tiny_language import tiny_llava, write_checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied head": {"tie_word_embeddings": True},
    "llama, wide heads": {"head_dim": 32},
    "llama, rope llama3": {"rope_parameters": LLAMA3},
    "llama, rope linear": {"rope_parameters": LINEAR},
    "qwen2": {},
    "qwen2, tied head": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3, wide heads": {"head_dim": 32},
}
IDS = np.random.default_rng(0).integers(5, 300, 200)


@pytest.fixture
def open_tiny(tmp_path: Path) -> Callable[..., Checkpoint]:
    def make(family: str, **changes: Any) -> Checkpoint:
        model = tiny_llava(family, **changes)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms of 1 and biases of 0 would hide a mistake
                noise = torch.randn(parameter.shape, generator=torch.manual_seed(len(name)))
                parameter.data = (parameter + 0.2 * noise).half().float()
        return open_checkpoint(write_checkpoint(tmp_path / "checkpoint", model))

    return make


def tensors(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(
    open_tiny: Callable[..., Checkpoint], tmp_path: Path, name: str
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python: run `make test-llamacpp`")

    checkpoint = open_tiny(name.split(",", maxsplit=1)[0], **FAMILIES[name])
    file = tmp_path / "exact.gguf"
    write_gguf(checkpoint, file, "f32")
    decoder = LlamaDecoder(file, _table(checkpoint), context_length=256, threads=1, cache="f32")
    backend = LlamaCppBackend(decoder, decoder.start_sequence())
    with torch.no_grad():
        model = checkpoint.language_model(torch.float32)
        expected = model(input_ids=torch.from_numpy(IDS)[None]).logits[0, -1].numpy()
    np.testing.assert_allclose(backend.prefill([IDS]), expected, atol=1e-4)
    backend.close()


class _Rows(EmbeddingTable):
    def __init__(self, rows: np.ndarray) -> None:
        self.vocabulary, self.hidden_size = rows.shape
        self._rows = rows


def _table(checkpoint: Checkpoint) -> EmbeddingTable:
    return _Rows(checkpoint.embedding_table().half().numpy())


def test_query_rows_are_reordered_for_llama_and_only_for_llama(
    open_tiny: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint = open_tiny("llama")
    write_gguf(checkpoint, tmp_path / "m.gguf")
    weight = checkpoint.language_model().model.layers[0].self_attn.q_proj.weight
    stored = tensors(tmp_path / "m.gguf")["blk.0.attn_q.weight"].data
    assert stored.dtype == np.float16
    # Head 0 is 16 rows: transformers pairs row 1 with row 9, llama.cpp row 2 with row 3.
    assert np.array_equal(stored[2], weight[1].detach().numpy())
    assert np.array_equal(stored[3], weight[9].detach().numpy())


def test_the_file_says_what_it_is(open_tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    write_gguf(open_tiny("qwen3", tie_word_embeddings=True), tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    said = {name: field.contents() for name, field in fields.items() if "GGUF." not in name}
    assert said["general.architecture"] == "qwen3"
    assert said["qwen3.vocab_size"] == 304
    assert said["qwen3.attention.head_count_kv"] == 2
    assert said["tokenizer.ggml.model"] == "none"
    assert "output.weight" not in tensors(tmp_path / "m.gguf")


@pytest.mark.llamacpp
def test_q4_k_m_says_which_tensors_fell_back(
    open_tiny: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python: run `make test-llamacpp`")
    checkpoint = open_tiny("llama", hidden_size=256, intermediate_size=320, num_hidden_layers=1)
    decoder = export_gguf(checkpoint, tmp_path, "q4_k_m")
    assert decoder.fallbacks == (Fallback("blk.0.ffn_down.weight", 320, "Q8_0"),)
    assert decoder.describe_fallbacks() == (
        "1 matrices do not fit the blocks of q4_k_m and are stored larger (320 columns -> Q8_0)."
    )
    file = tmp_path / decoder.model.file
    assert tensors(file)["blk.0.ffn_up.weight"].tensor_type.name == "Q4_K"
    assert [each.name for each in file.parent.iterdir()] == ["model-q4_k_m.gguf"]


@pytest.mark.llamacpp
def test_q8_0_needs_no_fallback(open_tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python: run `make test-llamacpp`")
    decoder = export_gguf(open_tiny("qwen2"), tmp_path, "q8_0")
    assert decoder.fallbacks == () and decoder.describe_fallbacks() == ""
    assert tensors(tmp_path / decoder.model.file)["output.weight"].tensor_type.name == "Q8_0"


def test_fallbacks_are_read_from_the_file(
    open_tiny: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    decoder = export_gguf(open_tiny("llama"), tmp_path, "f16")
    narrow = read_fallbacks(tmp_path / decoder.model.file, "q4_k_m")
    assert {each.columns for each in narrow} == {64, 96}
    assert read_fallbacks(tmp_path / decoder.model.file, "q8_0") == ()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma", {}, "model_type is 'gemma', not one of llama, qwen2, qwen3"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ("qwen2", {"rope_parameters": LINEAR}, "rope_type is 'linear', for qwen2 not one of"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
            "sliding window",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and llama.cpp computes 'silu'"),
    ],
)
def test_what_llama_cpp_would_compute_wrongly_is_refused(
    family: str, changes: dict[str, Any], message: str
) -> None:
    config = tiny_llava(family, **changes).config.text_config
    assert any(message in problem for problem in read_gguf_limits(config))


def test_a_refusal_names_the_file(open_tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    checkpoint = open_tiny("llama", hidden_act="gelu")
    with pytest.raises(CheckpointError, match=r"config\.json: .*cannot become a GGUF file"):
        write_gguf(checkpoint, tmp_path / "m.gguf")


def test_numbers_beyond_float16_are_refused(
    open_tiny: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint = open_tiny("llama")
    file = checkpoint.root / "model.safetensors"
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    (name,) = (name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name][0, 0] = 1e6
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight .* 1e\+06"):
        write_gguf(open_checkpoint(checkpoint.root), tmp_path / "m.gguf")
    assert list(tmp_path.glob("*.gguf*")) == list(tmp_path.glob(".*.part")) == []
