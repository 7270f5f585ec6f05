"""Split a graph in OpenVINO before the selection, so that only the tower runs in BF16.

OpenVINO takes one inference precision for a whole graph and cannot spare some nodes. The graph is
therefore cut into two models: the tower, and everything from the scores on. The cut is found by the
module names of the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engines.errors import EngineError

SELECTION_MODULES = ("reducer", "tower.scores")
"""Modules that choose tokens; the exporter names every node after its module."""


@dataclass(frozen=True)
class SplitModel:
    """Two halves of one graph; border tensors have the same names on both sides."""

    tower: Any
    selection: Any
    border: tuple[str, ...]


def has_selection(model: Any) -> bool:
    """Tell whether a model chooses tokens: a tower by itself need not, if nothing reads scores."""
    chooses = bool(_names_from_selection_on(model))
    is_tower = any(
        node.get_friendly_name().startswith("tower.") for node in model.get_ordered_ops()
    )
    return chooses or not is_tower


def split_at_selection(openvino: Any, model: Any) -> SplitModel:
    """Cut a model before the nodes that choose tokens.

    Raises:
        EngineError: no node is named after a module that chooses tokens.
    """
    operators = openvino.opset13
    behind = model.clone()
    chosen = _names_from_selection_on(behind)
    if not chosen:
        raise EngineError(
            "The graph does not name the modules that choose tokens "
            f"({', '.join(SELECTION_MODULES)}), so they cannot be kept in FP32 beside a BF16 "
            "tower. Export it again with `python -m export.build`, or run it in FP32."
        )
    border: dict[tuple[str, int], Any] = {}
    for node in behind.get_ordered_ops():
        # What is handed out leaves by the second half, also where the first has it already.
        if node.get_friendly_name() not in chosen and node.get_type_name() != "Result":
            continue
        for port in node.inputs():
            source = port.get_source_output()
            before = source.get_node()
            key = (before.get_friendly_name(), source.get_index())
            if key[0] in chosen or before.get_type_name() == "Constant":
                continue
            if key not in border:
                made = operators.parameter(source.get_partial_shape(), source.get_element_type())
                made.output(0).set_names({f"border_{len(border)}"})
                border[key] = made
            port.replace_source_output(border[key].output(0))
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    leaving = []
    for number, (name, index) in enumerate(border):
        result = operators.result(nodes[name].output(index))
        result.output(0).set_names({f"border_{number}"})
        leaving.append(result)
    return SplitModel(
        tower=openvino.Model(leaving, model.get_parameters(), "tower"),
        selection=openvino.Model(behind.get_results(), list(border.values()), "selection"),
        border=tuple(f"border_{number}" for number in range(len(border))),
    )


def _names_from_selection_on(model: Any) -> set[str]:
    """Return the nodes that choose tokens and all that follows from them.

    Integers do not count as a beginning: the shape of the batch, which the tower needs too, may
    carry the reducer's name.
    """
    chosen: set[str] = set()
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        module = name.split("/")[0]
        is_selection = any(
            module == outer or module.startswith(f"{outer}.") for outer in SELECTION_MODULES
        ) and any(port.get_element_type().is_real() for port in node.outputs())
        sources = (port.get_source_output().get_node() for port in node.inputs())
        if is_selection or any(source.get_friendly_name() in chosen for source in sources):
            chosen.add(name)
    return chosen
