"""The roofline against the efficiency tables of PruMerge and M3, and against arithmetic by hand.

Both papers ran LLM-Viewer (arXiv 2402.16363). What their tables need and where they differ:

* PruMerge (arXiv 2403.15388, table 2; V100: 900 GB/s, 112 FP16 TFLOPS, 62 INT8 TOPS) says 576 and
  40 visual tokens with 40 text tokens. Those 616 and 80 positions give 8.2 and 1.04 TFLOP, not the
  9.3 and 0.91 of the table; 699 and 70 positions give all of its numbers to a few percent, so
  these are the lengths used here. "INT4" is 4-bit weights and 4-bit activations multiplied at the
  INT8 peak, and its FLOPs column is divided by four. There is no INT8 row.
* M3 (arXiv 2405.17430, table 9) gives its lengths (30 text tokens) and calls the device a V100,
  but the times are those of LLM-Viewer's RTX A6000 entry: 768 GB/s and 154.8 FP16 TFLOPS.
* "Total memory" is in both the bytes moved during prefill, not the memory held: it counts
  activations as often as they are read and written.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from engines import estimate
from engines.cli import make_app
from engines.errors import CheckpointError, OptionError
from engines.roofline import (
    FAMILIES,
    LLM_PRECISIONS,
    MODELS,
    Bits,
    Cost,
    Roof,
    TransformerShape,
    estimate_answer,
    least_seconds,
    list_costs,
    roof_of,
    shape_from_config,
    total_cost,
    visionzip_operations,
)
from engines.targets import find_target

V100 = Roof(bandwidth_bytes_s=900e9, fp16_ops_s=112e12, int8_ops_s=62e12)
A6000 = Roof(bandwidth_bytes_s=768e9, fp16_ops_s=154.8e12, int8_ops_s=309.7e12)
FP16 = Bits(16, 16, 16)
W4A4 = Bits(4, 4, 4)
FULL, PRUNED = 699, 70

PRUMERGE_TABLE = [
    # model, positions, bits, TFLOP as printed, prefill ms, GB moved, GB of activations stored
    ("llava-1.5-7b", FULL, FP16, 9.3, 88.6, 23.3, 4.60),
    ("llava-1.5-7b", PRUNED, FP16, 0.91, 15.3, 13.7, 0.28),
    ("llava-1.5-7b", FULL, W4A4, 2.3, 151.6, 5.9, 1.20),
    ("llava-1.5-7b", PRUNED, W4A4, 0.28, 14.9, 3.5, 0.07),
    ("llava-1.5-13b", FULL, FP16, 18.2, 170.5, 41.6, 7.30),
    ("llava-1.5-13b", PRUNED, FP16, 1.80, 29.5, 26.6, 0.44),
    ("llava-1.5-13b", FULL, W4A4, 4.6, 294.9, 10.5, 1.80),
    ("llava-1.5-13b", PRUNED, W4A4, 0.45, 29.0, 6.8, 0.11),
]
M3_TABLE = [
    # visual tokens, TFLOP, prefill ms, GB moved
    (576, 8.0, 58.1, 21.6),
    (144, 2.2, 19.5, 15.0),
    (36, 0.9, 18.0, 13.8),
    (9, 0.5, 17.7, 13.6),
    (1, 0.4, 17.6, 13.5),
]


@pytest.mark.parametrize("row", PRUMERGE_TABLE, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_prumerge_table(row) -> None:
    model, positions, bits, tflop, prefill_ms, moved_gb, stored_gb = row
    costs = list_costs(MODELS[model], positions, bits, fused=False)
    total = total_cost(costs)
    printed = total.operations / 1e12 / (16 / bits.weights)
    # 0.28 in the table is 0.91 / 4 printed as if by 3.25; the other seven agree to 2 %.
    assert printed == pytest.approx(tflop, rel=0.2 if tflop == 0.28 else 0.02)
    assert least_seconds(costs, V100, bits) * 1e3 == pytest.approx(prefill_ms, rel=0.01)
    assert total.moved_bytes / 1e9 == pytest.approx(moved_gb, rel=0.02)
    # Keys and values are stored too but not counted by the papers as activations; the column of
    # the INT4 rows agrees only roughly (its last digit is 10 % of the number).
    kv = 2 * MODELS[model].layers * positions * MODELS[model].kv_width * bits.kv / 8
    assert (total.written_bytes - kv) / 1e9 == pytest.approx(stored_gb, rel=0.11)


@pytest.mark.parametrize(("visual", "tflop", "prefill_ms", "moved_gb"), M3_TABLE)
def test_m3_table(visual: int, tflop: float, prefill_ms: float, moved_gb: float) -> None:
    costs = list_costs(MODELS["llava-1.5-7b"], visual + 30, FP16, fused=False)
    total = total_cost(costs)
    assert total.operations / 1e12 == pytest.approx(tflop, abs=0.075)
    assert least_seconds(costs, A6000, FP16) * 1e3 == pytest.approx(prefill_ms, rel=0.005)
    assert total.moved_bytes / 1e9 == pytest.approx(moved_gb, rel=0.01)


def test_m3_times_are_not_those_of_a_v100() -> None:
    costs = list_costs(MODELS["llava-1.5-7b"], 606, FP16, fused=False)
    assert least_seconds(costs, V100, FP16) * 1e3 > 1.25 * 58.1


def test_operator_is_bound_by_the_slower_of_the_two() -> None:
    roof = Roof(bandwidth_bytes_s=1e9, fp16_ops_s=1e12, int8_ops_s=2e12)
    assert least_seconds([Cost(1e12, 1)], roof, FP16) == 1.0
    assert least_seconds([Cost(1, 5e8, 25e7, 25e7)], roof, FP16) == 1.0
    assert least_seconds([Cost(1e12, 1)], roof, W4A4) == 0.5


def test_llama_has_the_parameters_it_is_named_for() -> None:
    embeddings = 32000 * 4096
    assert MODELS["llava-1.5-7b"].parameters + embeddings == pytest.approx(6.74e9, rel=1e-3)
    assert MODELS["tinyllama-1.1b"].parameters + 32000 * 2048 == pytest.approx(1.1e9, rel=2e-3)


def test_decoding_is_bound_by_weights() -> None:
    roof = roof_of(find_target("jetson-orin"))
    bits = LLM_PRECISIONS["int4"]
    shape = MODELS["llava-1.5-7b"]
    found = estimate_answer(shape, roof, bits, prompt_tokens=104, new_tokens=1)
    alone = roof.bandwidth_bytes_s / (shape.parameters * bits.weight_bytes)
    assert 0.9 * alone < found.decode_tokens_s < alone


def test_fused_attention_moves_less_and_computes_the_same() -> None:
    shape = MODELS["llava-1.5-7b"]
    fused, plain = (
        total_cost(list_costs(shape, 600, FP16, fused=fused)) for fused in (True, False)
    )
    assert fused.operations == plain.operations
    assert fused.moved_bytes < 0.9 * plain.moved_bytes


def test_grouped_keys_shrink_the_cache() -> None:
    bits = LLM_PRECISIONS["fp16"]
    found = estimate_answer(MODELS["tinyllama-1.1b"], V100, bits, prompt_tokens=1, new_tokens=1)
    assert found.kv_bytes == 2 * 22 * 2 * (4 * 64) * 2


def test_visionzip_formula_by_hand() -> None:
    d, m, n = 4096, 11008, 64
    assert visionzip_operations(MODELS["llava-1.5-7b"], n) == 32 * (
        4 * n * d * d + 2 * n * n * d + 2 * n * d * m
    )


def test_shape_from_a_llava_config(tmp_path: Path) -> None:
    text = {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    shape = shape_from_config(tmp_path)
    assert (shape.layers, shape.kv_width, shape.vocabulary) == (2, 4, 100)
    del text["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="vocab_size missing"):
        shape_from_config(tmp_path)


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*llava-1\.5-7b"):
        estimate.find_shape("nowhere")


def test_target_without_peaks_says_what_to_give() -> None:
    with pytest.raises(OptionError, match=r"bandwidth_gb_s.*\[cpu\].*--targets"):
        roof_of(find_target("cpu"))


def run_cli(*arguments: str):
    return CliRunner().invoke(make_app(estimate.main), list(arguments))


def test_cli_on_an_orin() -> None:
    result = run_cli("--tokens", "64", "--target", "jetson-orin", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["fits"] is True
    assert 4 < found["full"]["prefill_ms"] / found["reduced"]["prefill_ms"] < 7
    assert found["reduced"]["memory_bytes"] < 5e9


def test_what_fits_includes_the_vision_tower(tmp_path: Path) -> None:
    small = tmp_path / "small.toml"  # 5 GB free hold the language model, but not the tower too
    small.write_text('[small]\nlike = "jetson-orin-nano"\ntitle = "small"\nmemory_gb = 5\n')
    result = run_cli("--target", "small", "--targets", str(small), "--json")
    found = json.loads(result.stdout)
    assert found["vision_bytes"] == pytest.approx(0.58e9, rel=0.01)
    assert found["reduced"]["memory_bytes"] < found["available_bytes"]
    assert found["fits"] is False


def test_cli_says_what_does_not_fit() -> None:
    result = run_cli("--target", "jetson-orin-nano", "--llm-precision", "fp16")
    assert result.exit_code == 0 and "does NOT fit" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--llm-precision", "int3"], "not one of fp16, int8, int4"),
        (["--tokens", "0"], "must be 1 or more"),
        (["--target", "jetson-orion"], "Did you mean jetson-orin"),
    ],
)
def test_cli_mistakes(arguments: list[str], expected: str) -> None:
    result = run_cli(*arguments)
    assert result.exit_code == 2 and expected in result.stderr


def test_sizes_that_a_config_leaves_out_are_transformers_own(tmp_path: Path) -> None:
    """As llava-hf/llava-1.5-7b-hf's config.json, which names none of its decoder's sizes."""
    hub = {"text_config": {"model_type": "llama", "vocab_size": 32064}}
    (tmp_path / "config.json").write_text(json.dumps(hub))
    assert shape_from_config(tmp_path) == replace(MODELS["llava-1.5-7b"], vocabulary=32064)
    for family, shape in FAMILIES.items():
        usual = AutoConfig.for_model(family)
        assert shape == TransformerShape(
            usual.num_hidden_layers,
            usual.hidden_size,
            usual.intermediate_size,
            usual.num_attention_heads,
            usual.num_key_value_heads,
            usual.vocab_size,
        )
