"""Turn the ONNX decoder, as OpenVINO reads it, into a model that keeps its own KV cache.

Each `GroupQueryAttention` becomes rotary embedding, a cached key and value, and attention, in the
shapes that OpenVINO's CPU plugin fuses into one operator, which appends to the cache in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.errors import BackendError

EMBEDDINGS, MASK, POSITIONS, ORDER = "inputs_embeds", "mask", "positions", "beam_idx"
LOGITS = "logits"
_ATTENTION = "GroupQueryAttention"
_EXPECTED = {
    "causal": True,
    "do_rotary": True,
    "kv_cache_bit_width": 0,
    "local_window_size": -1,
    "rotary_interleaved": False,
    "smooth_softmax": False,
}
"""What the attention of our decoders is; another would need another graph."""


@dataclass(frozen=True)
class StatefulGraph:
    """A decoder with a KV cache inside.

    Attributes:
        model: `inputs_embeds` float32[1, N, D], `mask` float32[1, 1, N, past + N], `positions`
            int64[N] and `beam_idx` int32[1] -> `logits` float32[1, 1, V].
        caches: names of the state's tensors, float32[1, heads, past, width] each.
        cache_shape: key-value heads and the width of one.
    """

    model: Any
    caches: tuple[str, ...]
    cache_shape: tuple[int, int]


def make_stateful(openvino: Any, model: Any, source: str) -> StatefulGraph:
    """Return the decoder with its cache inside; ``model`` is taken apart for it.

    Args:
        openvino: the module.
        model: the ONNX decoder as OpenVINO reads it.
        source: the file to name in errors.

    Raises:
        BackendError: the graph is no decoder that `export.build` wrote.
    """
    parameters = {node.get_friendly_name(): node for node in model.get_parameters()}
    results = [node for node in model.get_results() if LOGITS in node.output(0).get_names()]
    attentions = [node for node in model.get_ordered_ops() if node.get_type_name() == _ATTENTION]
    if EMBEDDINGS not in parameters or len(results) != 1 or not attentions:
        raise _other_graph(source, f"its inputs are {', '.join(sorted(parameters))}")
    rows = parameters[EMBEDDINGS]
    if rows.get_element_type() != openvino.Type.f32:
        raise _other_graph(source, "it computes in float16, which is for a GPU")
    rows.set_partial_shape(openvino.PartialShape([1, -1, rows.get_partial_shape()[2].get_length()]))
    writer = _AttentionWriter(openvino.opset13, openvino)
    for node in attentions:
        _check_attention(node, source)
        writer.replace(node)
    inputs = [rows, writer.mask, writer.positions, writer.order]
    stateful = openvino.Model(results, writer.written, inputs, "decoder")
    stateful.validate_nodes_and_infer_types()
    return StatefulGraph(stateful, tuple(writer.caches), writer.cache_shape)


def _check_attention(node: Any, source: str) -> None:
    found = node.get_attributes()
    wrong = [f"{name} {found.get(name)!r}" for name, value in _EXPECTED.items()
             if found.get(name, value) != value]  # fmt: skip
    if wrong:
        raise _other_graph(source, f"its attention has {', '.join(wrong)}")


def _other_graph(source: str, found: str) -> BackendError:
    return BackendError(
        f"{source} is not a decoder that export.build wrote: {found}. Build the bundle again, or "
        "run it with ONNX Runtime: --backend ort."
    )


class _AttentionWriter:
    """Writes one layer's attention after the other; what all layers share is made once."""

    def __init__(self, operators: Any, openvino: Any) -> None:
        self._op = operators
        self._openvino = openvino
        self.mask = self._parameter(MASK, [1, 1, -1, -1], np.float32)
        self.positions = self._parameter(POSITIONS, [-1], np.int64)
        self.order = self._parameter(ORDER, [-1], np.int32)
        self.written: list[Any] = []
        self.caches: list[str] = []
        self.cache_shape = (0, 0)
        self._rotations: dict[str, Any] = {}

    def replace(self, node: Any) -> None:
        """Put attention over a cache of the model's own in the place of a node."""
        query, key, value, past_key, past_value, _, _, cosines, sines = (
            port.get_source_output() for port in list(node.inputs())[:9]
        )
        fields = node.get_attributes()
        heads, pairs = int(fields["num_heads"]), int(fields["kv_num_heads"])
        width = past_key.get_partial_shape()[3].get_length()
        self.cache_shape = (pairs, width)
        rotation = self._rotation(cosines), self._rotation(sines)
        keys = self._cached(past_key, self._rotated(key, *rotation, width), heads)
        values = self._cached(past_value, value, heads)
        op = self._op
        attended = op.scaled_dot_product_attention(
            self._rotated(query, *rotation, width),
            keys,
            values,
            self.mask,
            op.constant(np.array(fields["scale"], np.float32)),
            causal=False,
        )  # [1, H, N, width]
        side_by_side = op.transpose(attended, self._ints([0, 2, 1, 3]))
        joined = op.reshape(side_by_side, self._ints([0, 0, heads * width]), True)
        node.output(0).replace(joined.output(0))

    def _rotation(self, table: Any) -> Any:
        """Return the rows of a table [context, width / 2] at the positions, [1, 1, N, width].

        The graph gathers it for all of the cache; here only new rows are turned.
        """
        if table.get_node().get_type_name() == "Gather":
            table = table.get_node().input_value(0)
        name = table.get_node().get_friendly_name()
        if name not in self._rotations:
            rows = self._op.gather(table, self.positions, self._ints(0))
            whole = self._op.concat([rows, rows], -1)
            self._rotations[name] = self._op.unsqueeze(whole, self._ints([0, 1]))
        return self._rotations[name]

    def _rotated(self, rows: Any, cosines: Any, sines: Any, width: int) -> Any:
        """Return rows [1, H, N, width] turned by their positions, halves against halves."""
        op = self._op
        halves = op.variadic_split(rows, self._ints(3), self._ints([width // 2, width // 2]))
        negative = op.multiply(halves.output(1), op.constant(np.array(-1, np.float32)))
        turned = op.concat([negative.output(0), halves.output(0)], -1)
        return op.add(op.multiply(rows, cosines), op.multiply(turned, sines))

    def _cached(self, past: Any, rows: Any, heads: int) -> Any:
        """Return the cache with rows [1, pairs, N, width] behind it, a copy for each head."""
        op, util = self._op, self._openvino.op.util
        pairs, width = self.cache_shape
        described = util.VariableInfo()
        described.data_shape = self._openvino.PartialShape([-1, pairs, -1, width])
        described.data_type = self._openvino.Type.f32
        described.variable_id = past.get_node().get_friendly_name()
        variable = util.Variable(described)
        nothing = op.constant(np.zeros((1, pairs, 0, width), np.float32))
        held = op.gather(op.read_value(nothing, variable), self.order, self._ints(0))
        whole = op.concat([held, rows], 2)
        self.written.append(op.assign(whole, variable))
        self.caches.append(described.variable_id)
        if pairs == heads:
            return whole
        shape = op.shape_of(whole)
        batch, length = (op.gather(shape, self._ints([axis]), self._ints(0)) for axis in (0, 2))
        groups = self._ints([heads // pairs])
        target = op.concat([batch, self._ints([pairs]), groups, length, self._ints([width])], 0)
        apart = op.unsqueeze(whole, self._ints(2))
        copied = op.broadcast(apart, target, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(copied, self._ints([0, heads, -1, width]), True)

    def _parameter(self, name: str, shape: list[int], dtype: Any) -> Any:
        made = self._op.parameter(shape, dtype, name=name)
        made.output(0).set_names({name})
        return made

    def _ints(self, values: int | list[int]) -> Any:
        return self._op.constant(np.array(values, np.int64))
