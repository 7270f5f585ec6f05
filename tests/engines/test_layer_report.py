"""The layer report on the inspector's JSON, in the wordings of TensorRT 8.6 and of 10."""

from __future__ import annotations

import json
from typing import Any

from engines.trt.layer_report import report_engine


def report(*layers: Any):
    return report_engine(json.dumps({"Layers": list(layers), "Bindings": ["pixel_values"]}))


def layer(name: str, kind: str, dtype: str, **fields: str) -> dict[str, Any]:
    tensor = {"Name": "t", "Dimensions": [1, 577, 64], "Format/Datatype": dtype}
    return {"Name": name, "LayerType": kind, "Inputs": [tensor], "Outputs": [tensor], **fields}


def test_fused_attention_is_told_from_softmax() -> None:
    found = report(
        layer(
            "_gemm_mha_v2_myl0_4",
            "kgen",
            "Half",
            Metadata="[ONNX Layer: tower.layers.0.attention/Softmax]",
        ),
        layer("__myl_SoftMax_0", "kgen", "Float", Metadata="[ONNX Layer: tower.scores/Softmax]"),
        layer("tower.layers.0.mlp.fc1", "gemm", "Half"),
    )
    assert (found.layers, found.fused_attentions, found.softmax_layers) == (3, 1, 1)
    assert found.kinds == {"kgen": 2, "gemm": 1}
    assert found.output_types == {"Half": 2, "Float": 1}


def test_quantization_that_was_not_taken_in_is_counted() -> None:
    found = report(
        layer("a_quantize", "Quantize", "Int8"),
        layer("conv", "CaskConvolution", "Int8"),
        layer("b_dequantize", "Dequantize", "Half"),
    )
    assert found.quantization_left == 2 and found.fused_attentions == 0


def test_older_wordings_of_types_are_read() -> None:
    found = report(layer("a", "gemm", "Row major linear FP16 format"), layer("b", "gemm", "Int8"))
    assert found.output_types == {"FP16": 1, "Int8": 1}


def test_names_alone_are_counted() -> None:
    found = report("one", "fmha_two")
    assert (found.layers, found.fused_attentions, found.kinds) == (2, 1, {"unknown": 2})


def test_an_engine_without_layers() -> None:
    assert report_engine("{}").layers == 0


def test_the_type_is_found_as_tensorrt_11_tells_it() -> None:
    tensor = {"Name": "t", "DataType": "Half", "Format": "Row major linear FP16 format (kLINEAR)"}
    found = report({"Name": "fc1", "LayerType": "gemm", "Outputs": [tensor]})
    assert found.output_types == {"Half": 1}
