"""What a bundle carries for the device it is for: a script that builds its engine, and a page.

Enters: a graph and a target that runs TensorRT. Leaves: `build_on_device.sh` (our builder, or the
equal trtexec call) and `BUILD_ON_DEVICE.md`, written into a bundle before it is published.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from engines.manifest import VisionGraph
from engines.targets import Target
from engines.trt.batch_profile import ANY_BATCH, BatchRange, shape_ranges
from engines.trt.plan import plan_name

SCRIPT_NAME = "build_on_device.sh"
PAGE_NAME = "BUILD_ON_DEVICE.md"


def write_device_files(
    folder: Path, graph: VisionGraph, target: Target, batch: BatchRange = ANY_BATCH
) -> tuple[str, ...]:
    """Write what builds the engine on the device; nothing where it is not built there.

    Args:
        folder: the bundle's (staging) directory.
        graph: the bundle's default graph.
        target: the device.
        batch: the sizes the engine is to take.

    Returns:
        The names of the files written.
    """
    if target.engine != "tensorrt":
        return ()
    script = folder / SCRIPT_NAME
    script.write_text(make_script(graph, target, batch), encoding="utf-8")
    script.chmod(0o755)
    (folder / PAGE_NAME).write_text(make_page(graph, target), encoding="utf-8")
    return (SCRIPT_NAME, PAGE_NAME)


def make_script(graph: VisionGraph, target: Target, batch: BatchRange) -> str:
    """Return the script."""
    values = {
        "TITLE": target.title,
        "TARGET": target.name,
        "SM": str(target.sm),
        "ONNX": graph.file,
        "PLAN": plan_name(graph, target),
        "SHAPES": _shape_options(graph, batch),
        "WORKSPACE": str(target.workspace_mb),
    }
    text = resources.files("engines.trt").joinpath(SCRIPT_NAME).read_text("utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _shape_options(graph: VisionGraph, batch: BatchRange) -> str:
    """Return trtexec's shape options, a line each; none where every shape is fixed."""
    if not any(isinstance(axis, str) for spec in graph.inputs for axis in spec.shape):
        return ""
    ranges = shape_ranges(graph.inputs, batch)
    lines = ""
    for option, which in (("min", "smallest"), ("opt", "tuned"), ("max", "largest")):
        shapes = ",".join(
            f"{name}:{'x'.join(str(axis) for axis in getattr(shape, which))}"
            for name, shape in ranges.items()
        )
        lines += f"        --{option}Shapes={shapes}\n"
    return lines


def make_page(graph: VisionGraph, target: Target) -> str:
    """Return the page."""
    jetpack = ", ".join(
        f"JetPack {release} (TensorRT {version})" for release, version in target.jetpack.items()
    )
    needs = jetpack or f"TensorRT {target.tensorrt_min} or newer"
    missing = "".join(
        f" TensorRT {version} was shipped without kernels for sm_{target.sm}."
        for version in target.tensorrt_without
    )
    return f"""# The engine of this bundle

`{graph.file}` is the vision graph in {graph.precision}. A TensorRT engine fits one kind of GPU and
one exact library version, so it is not part of the bundle: it is built on the {target.title}
itself, into `local/`.

    ./build_on_device.sh

It needs {needs}.{missing} `python3 -m engines.doctor .` says what is missing and how to get it, and
whether there is memory enough.

`./build_on_device.sh --trtexec` makes the equal call of NVIDIA's own tool; `--print` shows it.

Beside the engine lie `*.plan.json` (what built it, for what, when; checked at each start) and
`*.plan.layers.json` (its layers and their types). After an update of JetPack, TensorRT or the
driver the engine no longer fits; the error says so, and `python3 -m engines.build . --rebuild`
builds it again.
"""
