"""A bundle of a few kilobytes that needs no checkpoint: right in form, meaningless in content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.bundle import write_bundle
from engines.manifest import Manifest


def tiny_manifest(**changes: Any) -> dict[str, Any]:
    """Fields of a manifest without its files."""
    fields: dict[str, Any] = {
        "model": "tiny",
        "target": "cpu",
        "vision": [
            {
                "file": "vision.onnx",
                "inputs": [
                    {"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, 8, 8]}
                ],
                "outputs": [
                    {"name": "visual_tokens", "dtype": "float32", "shape": ["batch", 2, 3]}
                ],
                "reducer": {"name": "visionzip", "tokens": 2},
                "precision": "fp32",
                "opset": 18,
                "patch_rows": 2,
                "patch_columns": 2,
            }
        ],
        "preprocessing": {
            "resize_height": 8,
            "resize_width": 8,
            "height": 8,
            "width": 8,
            "rescale_factor": 1 / 255,
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.25, 0.3],
        },
        "text": {
            "embeddings": "embeddings.safetensors",
            "vocabulary": 8,
            "hidden_size": 3,
            "context_length": 32,
        },
        "prompt": {
            "tokenizer": "tokenizer.json",
            "chat_template": "{{ messages }}",
            "image_token": "<image>",
            "image_token_id": 3,
            "bos_token": None,
            "eos_token": None,
            "add_bos_token": False,
            "stop_token_ids": [2],
        },
        "language_models": [{"backend": "ort", "file": "decoder/model.onnx", "precision": "fp32"}],
        "versions": {"foveate": "0.1.0"},
    }
    return fields | changes


def tiny_vision_graph() -> bytes:
    """Return an ONNX file that averages each of 2 x 2 patches and keeps the last two of them."""
    # Imported here: a bare environment that runs the bundle has no onnx.
    import onnx.parser

    return onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        tiny (float[batch, 3, 8, 8] pixel_values) => (
            float[batch, 2, 3] visual_tokens, int64[batch] valid_count,
            int64[batch, 2] patch_index, int64[batch, 4] assignment
        ) <
            int64[3] rows = {0, 3, -1}, int64[2] pair = {2, 3}, int64[4] fate = {-1, -2, 0, 1},
            int64[1] two = {2}, int64[1] first = {0}, int64[1] second = {1}
        > {
            means = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (pixel_values)
            flat = Reshape (means, rows)
            patches = Transpose <perm = [0, 2, 1]> (flat)
            visual_tokens = Gather <axis = 1> (patches, pair)
            shape = Shape (pixel_values)
            batch = Gather (shape, first)
            valid_count = Expand (two, batch)
            pairs = Concat <axis = 0> (batch, two)
            patch_index = Expand (pair, pairs)
            four = Add (two, two)
            fours = Concat <axis = 0> (batch, four)
            assignment = Expand (fate, fours)
        }
    """).SerializeToString()


def write_tiny_bundle(destination: Path, *, overwrite: bool = False, **changes: Any) -> Path:
    """Write the bundle; its files hold their own names, but for the vision graph."""
    with write_bundle(destination, overwrite=overwrite) as draft:
        draft.path("vision.onnx").write_bytes(tiny_vision_graph())
        for name in (
            "embeddings.safetensors",
            "tokenizer.json",
            "decoder/model.onnx",
        ):
            draft.path(name).write_text(name)
        draft.describe(Manifest.model_validate(tiny_manifest(**changes)))
    return destination
