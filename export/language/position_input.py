"""Give an ONNX decoder inputs for where everything in its KV cache stands and how much it counts.

GroupQueryAttention turns the row at place i of the cache by row i of its rotation tables. Its own
input `position_ids` is ignored while the cache is empty (ONNX Runtime 1.31, CPU), which is when a
prompt with a picture is read. So the tables are gathered instead: row i is the one of the position
that place i has. Consecutive positions gather the tables as they are, so nothing is rounded anew.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from runtime.backends.ort import BIAS_INPUT, POSITIONS_INPUT

_ATTENTION = "GroupQueryAttention"
_TABLES = (7, 8)
"""Which inputs of it are the cosines and the sines, float[context, width / 2]."""
_BIAS = 10
"""Which input of it is added to the scores, float[1, 1, N, past + N]; on a CPU only."""


def add_bias_input(model: onnx.ModelProto) -> None:
    """Let every attention of a decoder add a given bias to its scores.

    Args:
        model: changed in place; it gets the input `BIAS_INPUT`, float32[1, 1, N, past + N].
    """
    for node in model.graph.node:
        if node.op_type == _ATTENTION:
            node.input.extend([""] * (_BIAS + 1 - len(node.input)))
            node.input[_BIAS] = BIAS_INPUT
    shape: list[int | str | None] = [1, 1, "sequence_length", "total_sequence_length"]
    model.graph.input.append(helper.make_tensor_value_info(BIAS_INPUT, TensorProto.FLOAT, shape))


def add_position_input(model: onnx.ModelProto) -> None:
    """Let every attention of a decoder turn keys and queries by given positions.

    Args:
        model: changed in place; it gets the input `POSITIONS_INPUT`, int64[past + N].

    Raises:
        RuntimeError: the model builder made an attention that does not rotate by itself.
    """
    graph = model.graph
    attentions = [node for node in graph.node if node.op_type == _ATTENTION]
    rotating = [node for node in attentions if len(node.input) > max(_TABLES)]
    if not attentions or len(rotating) != len(attentions):
        raise RuntimeError(
            f"{len(rotating)} of the decoder's {len(attentions)} attentions have rotation tables, "
            "expected all. Install the onnxruntime-genai that constraints.txt names."
        )
    gathered: dict[str, str] = {}
    for node in attentions:
        for at in _TABLES:
            table = node.input[at]
            node.input[at] = gathered.setdefault(table, f"{table}_of_positions")
    for at, (table, name) in enumerate(gathered.items()):
        gather = helper.make_node("Gather", [table, POSITIONS_INPUT], [name], name=name, axis=0)
        graph.node.insert(_after_producer(graph, table) + at, gather)
    shape = ["total_sequence_length"]
    graph.input.append(helper.make_tensor_value_info(POSITIONS_INPUT, TensorProto.INT64, shape))


def _after_producer(graph: onnx.GraphProto, name: str) -> int:
    """Return the place in the list of nodes from which on a tensor is there."""
    made = [at for at, node in enumerate(graph.node) if name in node.output]
    return made[0] + 1 if made else 0
