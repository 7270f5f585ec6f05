"""A real bundle of a tiny checkpoint, and copies of it that a test has altered."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from engines.bundle import open_bundle, write_bundle
from engines.manifest import ReducerSpec, SharedGraphs
from export.checkpoint.llava import open_checkpoint
from export.reducers import make_reducer
from export.vision.to_onnx import export_onnx
from export.vision.vision_module import build_vision_module
from graphs.float16 import write_fp16_graph

Change = Callable[[Path], "dict[str, Any] | None"]
"""Alters a bundle's files, and returns the fields of the manifest that change with them."""


def rewrite_bundle(source: Path, destination: Path, change: Change) -> Path:
    """Publish a copy that `change` has altered; its digests are those of the altered files."""
    bundle = open_bundle(source)
    with write_bundle(destination) as draft:
        for name in bundle.manifest.files:
            if name != "README.md":
                shutil.copy2(source / name, draft.path(name))
        described = change(draft.root)
        draft.describe(bundle.manifest.model_copy(update=described or {}))
    return destination


def change_weight(
    module: str, change: Callable[[np.ndarray], np.ndarray], name: str | None = None
) -> Change:
    """Change the weight that a module multiplies by, or adds; it lies in the part of that name."""

    def apply(root: Path) -> None:
        file = root / "vision" / (name or f"{module.split('.', maxsplit=1)[0]}.onnx")
        model = onnx.load(file)
        weight = next(w for w in model.graph.initializer if w.name.startswith(module))
        values = change(numpy_helper.to_array(weight).copy())
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        onnx.save(model, file)

    return apply


def put_fp16(source: Path) -> Change:
    """Replace the vision graphs by the float16 twin of the first."""

    def apply(root: Path) -> dict[str, Any]:
        bundle = open_bundle(source)
        half = []
        for stage in bundle.stages(bundle.vision()):
            write_fp16_graph(source / stage.file, root / stage.file)
            half.append(stage.model_copy(update={"precision": "fp16"}))
        tower, reducer, projector = half
        return {"vision": (reducer,), "shared": SharedGraphs(tower=tower, projector=projector)}

    return apply


def put_prumerge(source: Path, checkpoint: Path, budget: int = 6) -> Change:
    """Put a whole PruMerge graph in the place of the others."""

    def apply(root: Path) -> dict[str, Any]:
        reducer = make_reducer("prumerge", budget=budget)
        graph = build_vision_module(open_checkpoint(checkpoint), reducer)
        exported = export_onnx(graph, root / "vision" / "prumerge.onnx")
        changes = {
            "file": "vision/prumerge.onnx",
            "reducer": ReducerSpec(name="prumerge", tokens=budget, options=reducer.options),
            "inputs": exported.inputs,
            "outputs": exported.outputs,
        }
        first = open_bundle(source).vision()
        return {"vision": (first.model_copy(update=changes),), "shared": None}

    return apply
