"""Find the stage where two runs of one vision graph begin to differ.

A copy of the graph hands out what passes between its modules (embeddings, each layer, scores, keys,
merged tokens), and the error of each stage is taken against a reference. The error at the end does
not say where to look, because every later stage carries an error on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calibration.agreement.token_metrics import Array, kept_overlap, match_tokens, relative_error
from engines.session import Session
from graphs.joined import load_joined
from graphs.modules import is_inside, module_of
from runtime.vision import VisualTokens

EMBEDDINGS, SCORES, KEYS = "embeddings", "scores", "keys"
SELECTION, MERGING, PROJECTOR = "selection", "merging", "projector"

_EMBEDDINGS, _SCORES, _PROJECTOR = ("tower.embeddings",), ("tower.scores",), ("projector",)
_TYPE_CHANGES = ("Cast", "QuantizeLinear", "DequantizeLinear")


def layer_stage(layer: int) -> str:
    """Return the name of an encoder layer's stage; the first layer is 0, as in the checkpoint."""
    return f"layer {layer}"


@dataclass(frozen=True)
class StageError:
    """How far one stage is from the reference.

    Attributes:
        stage: its name.
        error: of tensors, the length of the difference over the length of the reference; of the
            selection, 1 - intersection over union. NaN or infinite where the values are.
        growth: ``error`` less the error of the stage it follows; 0 for the selection, whose error
            is of another kind.
        reference_is_finite: False where the reference itself has NaN or infinity there.
    """

    stage: str
    error: float
    growth: float
    reference_is_finite: bool = True

    @property
    def is_finite(self) -> bool:
        """Whether the stage can be compared at all."""
        return isfinite(self.error)


def tap_graph(source: Sequence[Path], file: Path) -> dict[str, list[str]]:
    """Write a copy of a graph that also returns the value of every stage.

    Args:
        source: the files of a vision graph, in the order they run; weights inside or beside them.
        file: where to write the copy; its weights go to ``<file>.data``.

    Returns:
        By the module a value comes from, the graph's new outputs. Empty (and nothing is written)
        where the nodes do not say which module they come from.
    """
    model = load_joined(source)
    taps = find_taps(model.graph)
    if not taps:
        return {}
    there = set(model.graph.outputs)
    for value in dict.fromkeys(value for values in taps.values() for value in values):
        if value not in there:
            model.graph.outputs.append(value)
    ir.save(model, file, external_data=f"{file.name}.data")
    return {module: [str(value.name) for value in values] for module, values in taps.items()}


def find_taps(graph: ir.Graph) -> dict[str, list[ir.Value]]:
    """Return the values that leave each stage's module, by the name of the module."""
    leaving: dict[str, dict[ir.Value, None]] = {}
    for node in graph:
        module = module_of(node)
        if node.op_type == "LayerNormalization" and is_inside(module, _EMBEDDINGS):
            leaving["tower.embeddings"] = {node.outputs[0]: None}
        # Two additions make a layer: of the attention, and last of the MLP.
        if node.op_type == "Add" and _layer_of(module) is not None:
            leaving[module] = {node.outputs[0]: None}
        for value in node.inputs:
            made = _before_type_changes(value)
            producer = made.producer() if made is not None else None
            if made is None or producer is None:
                continue
            source = module_of(producer)
            if is_inside(source, _SCORES) and not is_inside(module, _SCORES):
                leaving.setdefault("tower.scores", {})[made] = None
            if is_inside(module, _PROJECTOR) and not is_inside(source, _PROJECTOR):
                leaving.setdefault("reducer", {})[made] = None
    return {module: list(values) for module, values in leaving.items()}


def read_stages(outputs: Mapping[str, Array], taps: Mapping[str, list[str]]) -> dict[str, Array]:
    """Sort a tapped graph's outputs by stage.

    Args:
        outputs: what the graph returned for one picture.
        taps: from `tap_graph`.

    Returns:
        By the name of a stage, float[S, D] or float[P] of the picture, in the graph's own type.
    """
    stages: dict[str, Array] = {}
    for module, names in taps.items():
        layer = _layer_of(module)
        for name in names:
            value = outputs[name]
            if value.dtype.kind != "f" or value.ndim not in (2, 3):
                continue
            if module == "tower.scores":
                stages.setdefault(SCORES if value.ndim == 2 else KEYS, value[0])
            elif value.ndim == 3:
                stage = MERGING if module == "reducer" else EMBEDDINGS
                stages.setdefault(stage if layer is None else layer_stage(layer), value[0])
    return stages


def run_stages(
    session: Session, pixel_values: Array, taps: Mapping[str, list[str]]
) -> dict[str, Array]:
    """Run a tapped graph on one picture; see `read_stages`.

    Args:
        session: of the tapped copy.
        pixel_values: float[1, 3, H, W].
        taps: from `tap_graph`.
    """
    return read_stages(session.run({session.input_names[0]: pixel_values}), taps)


def measure_stages(
    reference: Mapping[str, Array],
    candidate: Mapping[str, Array],
    reference_tokens: VisualTokens,
    candidate_tokens: VisualTokens,
) -> list[StageError]:
    """Compare the stages of one picture, in the order they are computed.

    After the selection those tokens are compared that are made of the same (`match_tokens`). What
    only one side hands out is left out; the selection and the projector are always there.

    Args:
        reference: values by stage, in order.
        candidate: the same of the other.
        reference_tokens: what the reference made in the end; a batch of one.
        candidate_tokens: the same of the other.
    """
    theirs, ours = (one.origin[0, : one.valid[0]] for one in (reference_tokens, candidate_tokens))
    at_theirs, at_ours = match_tokens(reference_tokens, candidate_tokens)
    measured: list[StageError] = []
    error_of: dict[str, float] = {}

    def add(stage: str, reference: Array, candidate: Array, before: str) -> None:
        error = error_of[stage] = _error(reference, candidate)
        growth = error - error_of.get(before, 0.0)
        finite = bool(np.isfinite(reference).all())
        measured.append(StageError(stage, error, growth if isfinite(growth) else error, finite))

    tower_end = ""
    for stage, value in reference.items():
        if stage not in candidate or stage == MERGING:
            continue
        before = tower_end
        if stage not in (SCORES, KEYS):
            tower_end = stage
        add(stage, value, candidate[stage], before)
    measured.append(StageError(SELECTION, 1.0 - kept_overlap(theirs, ours), 0.0))
    if MERGING in reference and MERGING in candidate:
        add(MERGING, reference[MERGING][at_theirs], candidate[MERGING][at_ours], tower_end)
    ends = reference_tokens.tokens[0][at_theirs], candidate_tokens.tokens[0][at_ours]
    add(PROJECTOR, *ends, MERGING)
    return measured


def _error(reference: Array, candidate: Array) -> float:
    if reference.shape != candidate.shape:
        return float("inf")
    return relative_error(reference, np.asarray(candidate))


def _before_type_changes(value: ir.Value | None) -> ir.Value | None:
    """Return the value that a Cast or Q/DQ passes on: the border is where it was computed."""
    while value is not None:
        producer = value.producer()
        if producer is None or producer.op_type not in _TYPE_CHANGES:
            break
        value = producer.inputs[0]
    return value


def _layer_of(module: str) -> int | None:
    """Return the number of the encoder layer that a module is, not merely lies in."""
    before, _, number = module.rpartition(".")
    return int(number) if before == "tower.layers" and number.isdecimal() else None
