"""LLaVA checkpoints with a tiny language model of any family, and bundles of their language half.

The tokenizer is byte-level BPE, as most language models have: a character may take several tokens.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from engines.bundle import Bundle, open_bundle, write_bundle
from engines.manifest import LlmPrecision, Manifest
from export.checkpoint.llava import open_checkpoint
from export.language.onnx_decoder import Progress, export_language
from runtime.backends.ort import BIAS_INPUT, POSITIONS_INPUT
from tests.tiny_bundle import tiny_manifest

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CORPUS = [
    "USER: What is in the picture? ASSISTANT: A red cup on the left of a table.",
    "USER: How many chairs are there? ASSISTANT: Three chairs and one lamp.",
    "The robot turns left, then right; it stops before the door.",
]


def tiny_tokenizer(vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text can be written, and every id means some bytes."""
    bytes_pairs = Tokenizer(models.BPE())
    bytes_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_pairs.decoder = decoders.ByteLevel()
    bytes_pairs.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_pairs,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def tiny_llava(
    family: str = "llama", seed: int = 0, **changes: Any
) -> LlavaForConditionalGeneration:
    """A LLaVA over a tiny tower, in numbers that float16 holds exactly."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": 304,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if family == "qwen3":
        fields["head_dim"] = 16
    text = AutoConfig.for_model(family, **fields | changes)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=16,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    model: LlavaForConditionalGeneration = rounded(LlavaForConditionalGeneration(config))
    return model


def rounded(model: Any) -> Any:
    """The model, to be run, with weights that float16 holds exactly."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model.eval()


def write_checkpoint(root: Path, model: LlavaForConditionalGeneration) -> Path:
    """Write a checkpoint as save_pretrained does, with tokenizer, template and processor."""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(root, state_dict=half)
    write_checkpoint_words(root, model.config)
    return root


def write_checkpoint_words(root: Path, config: LlavaConfig) -> None:
    """Write what a checkpoint has beside weights and config: tokenizer, template, processor."""
    tiny_tokenizer().save_pretrained(root)
    (root / "chat_template.jinja").write_text(TEMPLATE)
    size = config.vision_config.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (root / "preprocessor_config.json").write_text(json.dumps(processor))
    slots = {
        "processor_class": "LlavaProcessor",
        "patch_size": config.vision_config.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    (root / "processor_config.json").write_text(json.dumps(slots))


def stand_in_graph(hidden_size: int) -> onnx.ModelProto:
    """A vision graph without a tower: each of 16 patches is its mean colour, projected."""
    weight = np.random.default_rng(0).normal(size=(3, hidden_size)).astype(np.float32)
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        vision (float[batch, 3, 28, 28] pixel_values) => (
            float[batch, 16, {hidden_size}] visual_tokens, int64[batch] valid_count,
            int64[batch, 16] patch_index, int64[batch, 16] assignment)
        <int64[3] flat = {{0, 3, 16}}, int64[3] pixels = {{1, 2, 3}}, int64[1] one = {{1}},
         int64[1] count = {{16}}, float[1] nothing = {{0.0}},
         int64[16] patches = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}}>
        {{
            pooled = AveragePool <kernel_shape = [7, 7], strides = [7, 7]> (pixel_values)
            columns = Reshape (pooled, flat)
            colours = Transpose <perm = [0, 2, 1]> (columns)
            visual_tokens = MatMul (colours, weight)
            sums = ReduceSum <keepdims = 0> (pixel_values, pixels)
            zeros = Mul (sums, nothing)
            zero_counts = Cast <to = 7> (zeros)
            valid_count = Add (zero_counts, count)
            zero_rows = Unsqueeze (zero_counts, one)
            patch_index = Add (zero_rows, patches)
            assignment = Identity (patch_index)
        }}""")
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    onnx.checker.check_model(model)
    return model


def stand_in_record() -> dict[str, Any]:
    """What the manifest says of the stand-in."""
    outputs = {
        "visual_tokens": ("float32", ["batch", 16, 64]),
        "valid_count": ("int64", ["batch"]),
        "patch_index": ("int64", ["batch", 16]),
        "assignment": ("int64", ["batch", 16]),
    }
    return {
        "file": "vision.onnx",
        "inputs": [{"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, 28, 28]}],
        "outputs": [
            {"name": name, "dtype": dtype, "shape": shape}
            for name, (dtype, shape) in outputs.items()
        ],
        "reducer": {"name": "none", "tokens": 16},
        "precision": "fp32",
        "opset": 18,
        "patch_rows": 4,
        "patch_columns": 4,
    }


def write_language_bundle(
    destination: Path,
    checkpoint: Path,
    precision: LlmPrecision = "fp32",
    progress: Progress | None = None,
) -> Bundle:
    """Write and open a bundle whose language half is real and whose vision graph is a stand-in."""
    with write_bundle(destination) as draft:
        language = export_language(
            open_checkpoint(checkpoint), draft.root, precision, progress=progress
        )
        onnx.save(stand_in_graph(language.text.hidden_size), str(draft.path("vision.onnx")))
        fields = tiny_manifest(
            vision=[stand_in_record()],
            preprocessing=open_checkpoint(checkpoint).preprocessing,
            text=language.text,
            prompt=language.prompt,
            language_models=[language.model],
        )
        draft.describe(Manifest.model_validate(fields))
    return open_bundle(destination)


def without_positions(bundle: Bundle, destination: Path) -> Bundle:
    """Return a copy whose ONNX decoder has no positions, as those of earlier releases."""
    shutil.copytree(bundle.root, destination)
    file = destination / "llm" / "ort" / "model.onnx"
    model = onnx.load(str(file), load_external_data=False)
    gathers = {node.output[0]: node for node in model.graph.node if POSITIONS_INPUT in node.input}
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            if name in gathers:
                node.input[at] = gathers[name].input[0]
        if node.op_type == "GroupQueryAttention":
            node.input[10] = ""
    for node in gathers.values():
        model.graph.node.remove(node)
    for given in list(model.graph.input):
        if given.name in (POSITIONS_INPUT, BIAS_INPUT):
            model.graph.input.remove(given)
    onnx.save(model, str(file))
    return replace(bundle, root=destination)
