"""Write a folder with which NVIDIA's Polygraphy checks a vision graph without Foveate.

The folder holds the graph, its inputs, PyTorch's outputs in Polygraphy's JSON, the scripts of
`golden_scripts/`, the measure they share with Foveate, and the command lines. The scripts need
NumPy and Polygraphy only.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from calibration.agreement import token_metrics
from engines.bundle import Bundle, open_bundle
from engines.errors import OptionError
from engines.manifest import TensorSpec, VisionGraph
from engines.staging import staged_directory
from export.checkpoint.llava import open_checkpoint
from export.reducers import make_reducer
from export.verify.comparison import VerifyOptions, find_pictures
from export.verify.golden_scripts.compare_outputs import GOLDEN
from export.verify.reference import VisionReference
from export.verify.sides import find_checkpoint, refuse_other_checkpoint
from export.verify.tolerances import tolerances_for
from export.vision.vision_module import OUTPUTS
from graphs.graph_file import write_graph
from graphs.joined import load_joined
from runtime.vision.pictures import load_picture
from runtime.vision.preprocess import preprocess_batch

MODEL = "model.onnx"
MOST_PICTURES = 16
"""How many are taken when nothing is said: a picture and its tokens are a few megabytes."""

_SCRIPTS = ("load_data.py", "compare_outputs.py")
_LIMITS = ("relative", "overlap", "cosine", "assignment")


def write_golden_run(
    options: VerifyOptions, folder: Path, note: Callable[[str], None] = lambda line: None
) -> tuple[str, ...]:
    """Write the folder completely or not at all.

    Args:
        options: one bundle, its checkpoint, pictures and tolerances; the rest has no say.
        folder: must not be there yet, or be empty.
        note: told what is left out.

    Returns:
        The files in it.

    Raises:
        FoveateError: something cannot be used, or Polygraphy is not installed.
    """
    if len(options.bundles) != 1:
        raise OptionError(
            f"--polygraphy takes one bundle and got {len(options.bundles)}. Run it once for each, "
            "into a folder each."
        )
    comparator = _import_comparator()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OptionError(f"--polygraphy {folder} is already there. Choose another folder.")
    found = find_pictures(options.images)
    pictures = found[: options.max_images or MOST_PICTURES]
    if len(pictures) < len(found):
        note(f"The first {len(pictures)} of {len(found)} pictures are taken; see --max-images.")
    bundle = open_bundle(options.bundles[0])
    graph = bundle.vision(options.tokens)
    _refuse_prefix(bundle, graph)
    limits = replace(tolerances_for(graph.precision, None), **options.tolerances)
    checkpoint = open_checkpoint(options.model or find_checkpoint([bundle]))
    refuse_other_checkpoint(bundle, checkpoint)
    spec = graph.reducer
    reference = VisionReference(checkpoint, make_reducer(spec.name, **spec.options))

    pixels, goldens = [], []
    for file in pictures:
        batch = preprocess_batch([load_picture(file)], bundle.preprocessing)  # [1, 3, H, W]
        seen = reference.encode(batch)
        made = (seen.tokens, seen.valid, seen.origin, seen.assignment)
        goldens.append(dict(zip(OUTPUTS, made, strict=True)))
        pixels.append(batch)
    with staged_directory(folder, OptionError) as root:
        _copy_graph(bundle, graph, root)
        given = bundle.stages(graph)[0].inputs[0]
        inputs: dict[str, Any] = {given.name: np.concatenate(pixels)}
        np.savez(root / "inputs.npz", **inputs)
        results = comparator.RunResults()
        results.add(goldens, runner_name=GOLDEN)
        # Not results.save: it logs on stdout.
        (root / "golden.json").write_text(results.to_json(), "utf-8")
        limits_of = {name: value for name, value in asdict(limits).items() if name in _LIMITS}
        document = {"outputs": list(OUTPUTS), **limits_of}
        (root / "limits.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        names = [file.name for file in pictures]
        _write_scripts(root, graph, given, names, checkpoint.name)
        return tuple(sorted(file.name for file in root.iterdir()))


def _refuse_prefix(bundle: Bundle, graph: VisionGraph) -> None:
    if graph.is_prefix:
        raise OptionError(
            f"{bundle.root}: {graph.reducer.tokens} visual tokens are the first, by rank, of the "
            f"{graph.leaves} that {graph.file} leaves. Polygraphy runs the graph as it is: ask for "
            f"--tokens {graph.leaves}."
        )


def _import_comparator() -> Any:
    try:
        return import_module("polygraphy.comparator")
    except ImportError as error:
        raise OptionError(
            f"Polygraphy, which --polygraphy writes for, is not installed here ({error}). Install "
            "it: pip install 'foveate[tensorrt]'."
        ) from error


def _copy_graph(bundle: Bundle, graph: VisionGraph, root: Path) -> None:
    """Copy the graph with its weights as one file, which in the bundle may be several."""
    model = load_joined([bundle.path(stage.file) for stage in bundle.stages(graph)])
    write_graph(model, root / MODEL, opset=graph.opset)


def _write_scripts(
    root: Path, graph: VisionGraph, given: TensorSpec, pictures: list[str], model: str
) -> None:
    scripts = files("export.verify").joinpath("golden_scripts")
    for name in _SCRIPTS:
        text = scripts.joinpath(name).read_text("utf-8")
        text = text.replace(f"from {token_metrics.__name__} import", "from token_metrics import")
        (root / name).write_text(text, "utf-8")
    shutil.copyfile(token_metrics.__file__, root / "token_metrics.py")
    shapes = _shape_flags(given)
    command = scripts.joinpath("run.sh").read_text("utf-8").replace("@SHAPES@", shapes)
    (root / "run.sh").write_text(command, "utf-8")
    (root / "run.sh").chmod(0o755)
    text = scripts.joinpath("README.md").read_text("utf-8")
    spec = graph.reducer
    for mark, value in (
        ("@MODEL@", model),
        ("@GRAPH@", f"{spec.name}, {spec.tokens} visual tokens, {graph.precision}"),
        ("@PICTURES@", ", ".join(pictures)),
        ("@SHAPES@", shapes),
    ):
        text = text.replace(mark, value)
    (root / "README.md").write_text(text, "utf-8")


def _shape_flags(given: TensorSpec) -> str:
    """Return the one shape the input has, as TensorRT's optimization profile."""
    size = ",".join(str(axis) if isinstance(axis, int) else "1" for axis in given.shape)
    shape = shlex.quote(f"{given.name}:[{size}]")
    return " ".join(f"--trt-{which}-shapes {shape}" for which in ("min", "opt", "max"))
