"""Report what became of a graph: its layers as parsed, and as TensorRT fused them.

The layers after fusion come from the engine inspector where a GPU can open the plan, and from the
build log elsewhere. Neither has a field for fusion, so it is told by the names of the kernels.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

_FUSED_ATTENTION = ("mha", "fmha", "flash_attention", "fused_attention")
_QUANTIZATION = ("quantize", "dequantize", "quantizelinear", "dequantizelinear")
_NO_KERNEL = ("wait", "signal", "ShapeHostToDevice")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_BYTES = {
    "half": 2, "bfloat16": 2, "fp16": 2, "int8": 1, "uint8": 1, "fp8": 1, "float8": 1, "bool": 1,
    "int64": 8,
}  # fmt: skip


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkReport(_Report):
    """The graph as NVIDIA's parser understood it, before any fusion."""

    layers: int
    kinds: dict[str, int]
    """TensorRT layer type -> count."""
    output_types: dict[str, int]
    """Type of the layers' outputs -> count."""


class EngineReport(_Report):
    """The engine as it was built."""

    layers: int
    kinds: dict[str, int]
    output_types: dict[str, int]
    fused_attentions: int
    """Layers that compute a whole attention."""
    softmax_layers: int
    """Softmax outside fused attention: attention that was not fused, and the reducer's own."""
    quantization_left: int
    """Layers that only quantize or dequantize: each costs a pass over its tensor."""
    moved_bytes: int
    """Sizes of all that the layers read and write, weights included, at batch 1."""

    @property
    def kernels(self) -> int:
        """Layers that compute; the others order streams."""
        return sum(count for kind, count in self.kinds.items() if kind not in _NO_KERNEL)


class LayerReport(_Report):
    """What is saved as `<plan>.layers.json`."""

    parse_seconds: float
    network: NetworkReport
    engine: EngineReport | None
    """None where neither a GPU could open the plan nor the build log told of layers."""


def report_network(network: Any) -> NetworkReport:
    """Count the layers of a parsed `INetworkDefinition`."""
    kinds: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kinds[layer.type.name] += 1
        for output in range(layer.num_outputs):
            tensor = layer.get_output(output)
            if tensor is not None:
                types[tensor.dtype.name] += 1
    return NetworkReport(
        layers=network.num_layers, kinds=_sorted(kinds), output_types=_sorted(types)
    )


def report_engine(inspector_json: str) -> EngineReport | None:
    """Count the layers of an engine from `EngineInspector.get_engine_information`."""
    return report_layers(json.loads(inspector_json).get("Layers", []))


def report_layers(layers: Sequence[dict[str, Any] | str]) -> EngineReport | None:
    """Count the layers of an engine, as the inspector or the build log describes them.

    Returns:
        The counts; None where there is no layer.
    """
    if not layers:
        return None
    kinds: Counter[str] = Counter()
    types: Counter[str] = Counter()
    fused = softmax = quantization = moved = 0
    for layer in layers:
        # Without detailed verbosity a layer is only its name.
        entry: dict[str, Any] = {"Name": layer} if isinstance(layer, str) else layer
        kind = str(entry.get("LayerType") or "unknown")
        kinds[kind] += 1
        name = f"{entry.get('Name', '')} {entry.get('TacticName', '')}".lower()
        is_attention = any(word in name for word in _FUSED_ATTENTION)
        fused += is_attention
        origin = f"{name} {kind} {entry.get('Metadata', '')}".lower()
        softmax += "softmax" in origin and not is_attention
        quantization += _only_quantizes(entry, kind)
        for output in entry.get("Outputs", []):
            types[_type_of(output)] += 1
        moved += sum(
            _bytes_of(tensor)
            for role in ("Inputs", "Constants", "Outputs")
            for tensor in entry.get(role, [])
        )
    return EngineReport(
        layers=len(layers),
        kinds=_sorted(kinds),
        output_types=_sorted(types),
        fused_attentions=fused,
        softmax_layers=softmax,
        quantization_left=quantization,
        moved_bytes=moved,
    )


def _only_quantizes(entry: dict[str, Any], kind: str) -> bool:
    """Return whether a layer does nothing but Q or DQ."""
    if kind.lower() in _QUANTIZATION:
        return True
    nodes = _ONNX_NODE.findall(str(entry.get("Metadata", "")))
    return bool(nodes) and all("quantizelinear" in node.lower() for node in nodes)


def _bytes_of(tensor: dict[str, Any]) -> int:
    """Return the size of a tensor; a batch that is not fixed counts as 1."""
    sizes = [abs(int(size)) for size in tensor.get("Dimensions", [])]
    return math.prod(sizes) * _BYTES.get(_type_of(tensor).lower(), 4)


def _type_of(tensor: dict[str, Any]) -> str:
    """Return the type in a tensor's description.

    TensorRT 10 says "Half" under "Format/Datatype", 11 under "DataType"; 8.6 said "Row major linear
    FP16 format", where only FP16 matters.
    """
    fields = {name.lower(): value for name, value in tensor.items()}
    text = str(fields.get("datatype") or fields.get("format/datatype") or "unknown")
    words = text.removesuffix(" format").split()
    return words[-1] if words else "unknown"


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(counts.most_common())
