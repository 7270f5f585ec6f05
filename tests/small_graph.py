"""A vision graph small enough to compile in a second: patches, attention, a fixed top-k, a matmul.

It has the operators a real one has (Conv, LayerNormalization, Softmax, TopK, GatherElements) and
the bundle's input and output names, so that what builds and runs plans can be tested before, and
apart from, the exporter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.bundle import write_bundle
from engines.manifest import Manifest
from tests.tiny_bundle import tiny_manifest

SIDE, PATCH, WIDTH, KEPT = 8, 4, 16, 2
PATCHES = (SIDE // PATCH) ** 2


def make_small_graph(
    seed: int = 0, *, half: bool = False, refused: bool = False
) -> onnx.ModelProto:
    """Return the graph.

    Args:
        seed: of the weights.
        half: FP16 between the input and the scores, which stay FP32.
        refused: with an operator of ONNX that TensorRT does not have.
    """
    random = np.random.default_rng(0)
    dtype = np.float16 if half else np.float32

    def weights(*shape: int) -> NDArray[np.floating]:
        return (random.standard_normal(shape) * 0.2).astype(dtype)

    constants: dict[str, NDArray[np.generic]] = {
        "patch_weight": weights(WIDTH, 3, PATCH, PATCH),
        "scale": np.ones(WIDTH, dtype),
        "bias": np.zeros(WIDTH, dtype),
        "query_weight": weights(WIDTH, WIDTH),
        "flat": np.array([0, WIDTH, PATCHES], np.int64),
        "last": np.array([2], np.int64),
        "kept": np.array([KEPT], np.int64),
        "wide": np.array([1, 1, WIDTH], np.int64),
    }
    make = helper.make_node
    nodes = [
        make("Cast", ["pixel_values"], ["pixels"], to=TensorProto.FLOAT16 if half else 1),
        make("Conv", ["pixels", "patch_weight"], ["grid"], strides=[PATCH, PATCH]),
        make("Reshape", ["grid", "flat"], ["columns"]),
        make("Transpose", ["columns"], ["patches"], perm=[0, 2, 1]),
        make("LayerNormalization", ["patches", "scale", "bias"], ["features"], axis=-1),
        make("MatMul", ["features", "query_weight"], ["queries"]),
        make("Transpose", ["features"], ["keys"], perm=[0, 2, 1]),
        make("MatMul", ["queries", "keys"], ["logits"]),
        make("Cast", ["logits"], ["wide_logits"], to=1),
        make("Softmax", ["wide_logits"], ["attention"], axis=-1),
        make("ReduceMax", ["attention"], ["scores"], axes=[1], keepdims=0),
        make("TopK", ["scores", "kept"], ["values", "patch_index"], axis=1),
        make("Unsqueeze", ["patch_index", "last"], ["rows"]),
        make("Expand", ["rows", "wide"], ["all_rows"]),
        make("Cast", ["features"], ["wide_features"], to=1),
        make("GatherElements", ["wide_features", "all_rows"], ["visual_tokens"], axis=1),
    ]
    if refused:
        nodes[-1] = make("Unique", ["wide_features"], ["visual_tokens"])
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("pixel_values", 1, ["batch", 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("visual_tokens", 1, ["batch", KEPT, WIDTH]),
            helper.make_tensor_value_info("patch_index", TensorProto.INT64, ["batch", KEPT]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def write_small_bundle(
    destination: Path,
    *,
    target: str = "cpu",
    precision: str = "fp32",
    refused: bool = False,
    graphs: int = 1,
) -> Path:
    """Write a bundle whose vision graphs can be run and compiled."""
    fields = tiny_manifest(target=target)
    vision = fields["vision"][0]
    vision |= {
        "precision": precision,
        "opset": 17,
        "inputs": [{"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, SIDE, SIDE]}],
        "outputs": [
            {"name": "visual_tokens", "dtype": "float32", "shape": ["batch", KEPT, WIDTH]},
            {"name": "patch_index", "dtype": "int64", "shape": ["batch", KEPT]},
        ],
    }
    more = [
        vision
        | {"file": f"vision_{number}.onnx", "reducer": {"name": "visionzip", "tokens": 2 + number}}
        for number in range(1, graphs)
    ]
    fields["vision"] += more
    model = make_small_graph(half=precision == "fp16", refused=refused)
    with write_bundle(destination) as draft:
        for graph in fields["vision"]:
            draft.path(graph["file"]).write_bytes(model.SerializeToString())
        for name in ("embeddings.safetensors", "tokenizer.json", "decoder/model.onnx"):
            draft.path(name).write_text(name)
        draft.describe(Manifest.model_validate(fields))
    return destination
