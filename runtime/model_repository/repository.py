"""Write a model repository for Triton from a bundle: `write_repository`.

Each model's folder is put in its place whole. Other models of the repository are left alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engines.bundle import Bundle
from engines.errors import EngineError, OptionError
from engines.frame_size import frame_size_of
from engines.manifest import VisionGraph
from engines.opening import target_of
from engines.staging import staged_directory
from runtime.model_repository.configs import (
    MARK,
    Backend,
    RepositoryOptions,
    ensemble_config,
    ensemble_name,
    preprocess_config,
    preprocess_name,
    vision_config,
    vision_name,
)

_CONFIG = "config.pbtxt"
_VERSION = "1"
_MAX_BATCH = 8
_GLUE = '''\
"""Picture files become `pixel_values`; the installed package foveate does it."""

from runtime.model_repository.picture_model import TritonPythonModel  # noqa: F401
'''
_VISION = '''\
"""The vision graph of a bundle; the installed package foveate runs it on one of its engines."""

from runtime.model_repository.vision_model import TritonPythonModel  # noqa: F401
'''


def write_repository(
    bundle: Bundle,
    out: str | Path,
    options: RepositoryOptions | None = None,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write the models that turn pictures into visual tokens.

    Args:
        bundle: from `open_bundle`.
        out: the model repository, which may hold other models.
        options: what is served, and how it is batched.
        overwrite: replace models that were written by this function.

    Returns:
        The folder of each model: one that preprocesses, and for each vision graph two.

    Raises:
        OptionError: a model of that name is there, the folder cannot be written, or Triton cannot
            run the bundle as it is asked for.
        EngineError: there is no TensorRT plan that Triton could run.
        BundleError: the graph cannot be batched.
    """
    chosen = options or RepositoryOptions()
    goal = Path(out)
    if frame_size_of(bundle.manifest.vision_files.files[0]) is not None:
        raise OptionError(
            f"{bundle.root} takes camera frames of one size, and this repository serves pictures "
            "of any. Build the bundle without --input uint8."
        )
    if bundle.manifest.tiles is not None:
        raise OptionError(
            f"{bundle.root} cuts a picture into tiles, whose number depends on the picture, and a "
            "model of this repository gives as many tokens for each. Serve it with `python -m "
            "runtime.serve`."
        )
    graphs = _graphs(bundle, chosen.visual_tokens)
    backend = chosen.vision or _usual_backend(bundle)
    if bundle.manifest.shared is not None and backend != "python":
        raise OptionError(
            f"--vision {backend}: the budgets of {bundle.root} share their tower, and Triton runs "
            "one file. Use --vision python, or build a bundle with one budget: "
            "`python -m export.build --tokens N`."
        )
    served = [_served(bundle, graph, chosen, backend) for graph in graphs]
    written = []
    with _model(goal, preprocess_name(chosen), overwrite) as folder:
        most = max(each.max_batch for each in served)
        _describe(folder, preprocess_config(bundle, chosen, most))
        (folder / _VERSION / "model.py").write_text(_GLUE, encoding="utf-8")
        written.append(goal / preprocess_name(chosen))
    for each in served:
        name = vision_name(chosen, each.graph)
        with _model(goal, name, overwrite) as folder:
            _describe(folder, vision_config(bundle, each.graph, chosen, backend, each.max_batch))
            _write_vision(folder / _VERSION, bundle, each, backend)
            written.append(goal / name)
        name = ensemble_name(chosen, each.graph)
        with _model(goal, name, overwrite) as folder:
            _describe(folder, ensemble_config(bundle, each.graph, chosen, each.max_batch))
            written.append(goal / name)
    return written


def _graphs(bundle: Bundle, visual_tokens: int | None) -> tuple[VisionGraph, ...]:
    """Return the graphs to serve, each file's largest budget.

    Raises:
        OptionError: only a part of what a graph leaves was asked for, or there is no such budget.
    """
    if visual_tokens is None:
        return tuple(graph for graph in bundle.manifest.vision if not graph.is_prefix)
    graph = bundle.vision(visual_tokens)
    if graph.is_prefix:
        raise OptionError(
            f"--visual-tokens {visual_tokens}: {bundle.root} has it as the first of {graph.leaves} "
            f"tokens. Serve these: --visual-tokens {graph.leaves}; `token_order` tells the first."
        )
    return (graph,)


def _usual_backend(bundle: Bundle) -> Backend:
    """Return what runs the vision graph unless it is said."""
    if bundle.manifest.shared is not None:
        return "python"
    return "tensorrt" if target_of(bundle).engine == "tensorrt" else "onnxruntime"


@dataclass(frozen=True)
class _Served:
    """A vision graph, its TensorRT plan if that is what runs it, and the largest batch."""

    graph: VisionGraph
    plan: Path | None
    max_batch: int


def _served(
    bundle: Bundle, graph: VisionGraph, options: RepositoryOptions, backend: Backend
) -> _Served:
    if backend == "tensorrt":
        return _Served(graph, *_plan(bundle, graph, options))
    return _Served(graph, None, options.max_batch or _MAX_BATCH)


@contextmanager
def _model(goal: Path, name: str, overwrite: bool) -> Iterator[Path]:
    """Give a folder that becomes a model's when the block ends well."""
    place = goal / name

    def check() -> None:
        if not place.exists():
            return
        config = place / _CONFIG
        ours = config.is_file() and config.read_text(encoding="utf-8").startswith(MARK)
        if not ours:
            raise OptionError(
                f"{place} is there and was not written by `foveate triton`, so it is not replaced. "
                "Choose another --name or --out."
            )
        if not overwrite:
            raise OptionError(
                f"{place} is already there. Pass --overwrite to replace it, or choose another "
                "--name or --out."
            )

    with staged_directory(place, OptionError, check=check) as folder:
        (folder / _VERSION).mkdir()
        yield folder


def _describe(folder: Path, config: str) -> None:
    (folder / _CONFIG).write_text(config, encoding="utf-8")


def _write_vision(folder: Path, bundle: Bundle, served: _Served, backend: Backend) -> None:
    """Write what runs the vision graph into the folder of a model's version."""
    graph = served.graph
    if served.plan is not None:
        shutil.copyfile(served.plan, folder / "model.plan")
    elif backend == "python":
        (folder / "model.py").write_text(_VISION, encoding="utf-8")
    else:
        shutil.copyfile(bundle.path(graph.file), folder / "model.onnx")
        if graph.weights is not None:  # the graph names them relative to itself
            beside = os.path.relpath(graph.weights, Path(graph.file).parent)
            shutil.copyfile(bundle.path(graph.weights), folder / beside)


def _plan(bundle: Bundle, graph: VisionGraph, options: RepositoryOptions) -> tuple[Path, int]:
    """Return the TensorRT plan of a graph, and how many pictures it takes at most.

    Raises:
        EngineError: none was built here, or Triton could not run it.
    """
    from engines.trt.plan import (
        check_signature,
        find_plan,
        read_checked,
        read_record,
        rebuild_hint,
    )

    wanted = options.max_batch or _MAX_BATCH
    target = target_of(bundle)
    if target.engine != "tensorrt":
        raise EngineError(
            f"--vision tensorrt: the target {target.name} of {bundle.root} has {target.engine}, "
            "whose plans Triton's backend tensorrt does not run. Use --vision onnxruntime or "
            "python."
        )
    plan = find_plan(bundle, graph, target, wanted)
    record = read_record(plan)
    read_checked(plan, record)
    check_signature(plan, record)
    if record.onnx_sha256 != bundle.manifest.files[graph.file].sha256:
        raise EngineError(f"{plan} was built of another {graph.file}. {rebuild_hint(plan)}.")
    profile = record.profile[graph.inputs[0].name]
    smallest, largest = profile.min[0], profile.max[0]
    if smallest > 1 or (options.max_batch or 1) > largest:
        raise EngineError(
            f"{plan} takes {smallest} to {largest} pictures, expected 1 to {wanted}. Build it with "
            f"`python -m engines.build {bundle.root} --batch 1/{wanted}/{wanted}`."
        )
    return plan, min(largest, wanted)
