"""A decoder written tensor by tensor is the one that onnxruntime-genai's builder writes whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import onnx
import pytest
from onnx import helper, numpy_helper

from export.checkpoint.llava import open_checkpoint
from export.language.onnx_decoder import GRAPH_FILE, write_decoder
from export.language.position_input import add_bias_input, add_position_input
from tests.tiny_language import tiny_llava, write_checkpoint


def build_whole(checkpoint: Path, root: Path, device: str) -> onnx.ModelProto:
    """Build with the builder alone, which holds everything in float32."""
    open_checkpoint(checkpoint).write_language_model(root / "plain")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4"]
    command += ["-i", str(root / "plain"), "-o", str(root / "built"), "-c", str(root / "cache")]
    command += ["-e", device, "--extra_options", "exclude_embeds=true", "prune_lm_head=true"]
    subprocess.run(command, check=True, capture_output=True)
    return onnx.load(str(root / "built" / "model.onnx"))


def nodes_of(model: onnx.ModelProto) -> list[Any]:
    return sorted(
        (
            node.op_type,
            node.domain,
            node.name,
            tuple(node.input),
            tuple(node.output),
            sorted((a.name, str(helper.get_attribute_value(a))) for a in node.attribute),
        )
        for node in model.graph.node
    )


def tensors_of(model: onnx.ModelProto) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    arrays = {t.name: (t.data_type, numpy_helper.to_array(t)) for t in model.graph.initializer}
    return {name: (kind, array.shape, array.tobytes()) for name, (kind, array) in arrays.items()}


@pytest.mark.parametrize(
    ("family", "changes", "device"),
    [
        ("qwen2", {"tie_word_embeddings": True}, "cpu"),
        # Not whole blocks of 32, and a head that is its own.
        ("llama", {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}, "cuda"),
    ],
)
def test_graph_and_bytes_are_the_builders(
    tmp_path: Path, family: str, changes: dict[str, Any], device: Literal["cpu", "cuda"]
) -> None:
    root = write_checkpoint(tmp_path / "checkpoint", tiny_llava(family, **changes))
    write_decoder(open_checkpoint(root), tmp_path, "int4", device=device)
    ours = onnx.load(str(tmp_path / GRAPH_FILE))
    theirs = build_whole(root, tmp_path / "whole", device)
    add_position_input(theirs)
    if device == "cpu":
        add_bias_input(theirs)
    assert nodes_of(ours) == nodes_of(theirs)
    assert tensors_of(ours) == tensors_of(theirs)
    assert [(o.domain, o.version) for o in ours.opset_import] == [
        (o.domain, o.version) for o in theirs.opset_import
    ]
    assert "MatMulNBits" in {node.op_type for node in ours.graph.node}
