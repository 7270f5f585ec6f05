"""The layer report on the inspector's JSON, in the wordings of TensorRT 8.6 and of 10."""

from __future__ import annotations

import json
import logging
from typing import Any

from engines.trt.build_log import BuildLog, parse_layer
from engines.trt.layer_report import report_engine, report_layers


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
    assert report_engine("{}") is None


LOG_LINE = (
    "Name: _gemm_mha_v2_myl0_9, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [-1,65,16], "
    "Strides: [16,-1,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Arbitrary) Format with "
    "stride order = [1,2,0] }, { Name: k, Dimensions: [4,16], Strides: [16,1], StrideOrder: [1,0], "
    "Datatype: Float, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { "
    "Name: out, Dimensions: [-1,65,16], Strides: [16,-1,1], StrideOrder: [1,2,0], Datatype: Int8, "
    "Format: (Arbitrary) Format with stride order = [1,2,0] }], TacticName: _gemm_mha_v2_0xcb61, "
    "StreamId: 0, Metadata: [ONNX Layer: tower.layers.0.attention/MatMul_1][ONNX Layer: "
    "tower.layers.0.attention/Softmax]"
)


def test_a_line_of_the_build_log_is_read() -> None:
    layer = parse_layer(LOG_LINE)
    assert layer is not None
    assert layer["Name"] == "_gemm_mha_v2_myl0_9" and layer["Constants"] == []
    assert [tensor["Dimensions"] for tensor in layer["Inputs"]] == [[-1, 65, 16], [4, 16]]
    found = report_layers([layer])
    assert found is not None
    assert (found.fused_attentions, found.softmax_layers, found.output_types) == (1, 0, {"Int8": 1})
    assert found.moved_bytes == 65 * 16 * 2 + 4 * 16 * 4 + 65 * 16
    assert parse_layer("ModelImporter.cpp:728: LayerType: none") is None


def test_a_layer_that_only_quantizes_is_left_over() -> None:
    names = ("[ONNX Layer: fc1/QuantizeLinear_input]", "[ONNX Layer: fc1/MatMul]")
    alone = layer("__myl_MulRoun", "kgen", "Int8", Metadata=names[0])
    fused = layer("__myl_FcRoun", "kgen", "Int8", Metadata="".join(names))
    found = report_layers([alone, fused])
    assert found is not None and found.quantization_left == 1


def test_a_build_log_keeps_errors_and_layers() -> None:
    logger = logging.getLogger("Polygraphy")
    with BuildLog() as log:
        logger.log(2, "nothing of use")
        logger.log(2, f"Engine Layer Information:\n{LOG_LINE}\n{LOG_LINE}")
        logger.error("it  broke\nhere")
    logger.error("heard no more")
    assert log.errors == ["it broke here"] and len(log.layers) == 2


def test_the_type_is_found_as_tensorrt_11_tells_it() -> None:
    tensor = {"Name": "t", "DataType": "Half", "Format": "Row major linear FP16 format (kLINEAR)"}
    found = report({"Name": "fc1", "LayerType": "gemm", "Outputs": [tensor]})
    assert found.output_types == {"Half": 1}
