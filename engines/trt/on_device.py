"""Write the build script and the page that a bundle carries for its device.

`build_on_device.sh` builds the plans, with our builder or with trtexec. `BUILD_ON_DEVICE.md`
explains it.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from engines.bundle import LOCAL_DIRECTORY
from engines.manifest import Graph, VisionFiles
from engines.targets import Target
from engines.trt.batch_profile import ONE_IMAGE, BatchRange, shape_ranges, token_range
from engines.trt.plan import plan_name

SCRIPT_NAME = "build_on_device.sh"
PAGE_NAME = "BUILD_ON_DEVICE.md"


def write_device_files(
    folder: Path, files: VisionFiles, target: Target, batch: BatchRange = ONE_IMAGE
) -> tuple[str, ...]:
    """Write the build script and page, if the engines are built on the device.

    Args:
        folder: the bundle's (staging) directory.
        files: the bundle's vision graphs.
        target: the device.
        batch: the sizes the engines are to take.

    Returns:
        The names of the files written.
    """
    if target.engine != "tensorrt":
        return ()
    script = folder / SCRIPT_NAME
    script.write_text(make_script(files, target, batch), encoding="utf-8")
    script.chmod(0o755)
    (folder / PAGE_NAME).write_text(make_page(files, target), encoding="utf-8")
    return (SCRIPT_NAME, PAGE_NAME)


def make_script(files: VisionFiles, target: Target, batch: BatchRange) -> str:
    """Return the script."""
    tokens = token_range(files.token_counts)
    values = {
        "TITLE": target.title,
        "TARGET": target.name,
        "SM": str(target.sm),
        "GRAPHS": "\n".join(
            f"    {graph.file} {LOCAL_DIRECTORY}/{plan_name(graph, target)}.trtexec "
            f"'{_shape_options(graph, batch, tokens)}'"
            for graph in files.files
        ),
        "WORKSPACE": str(target.workspace_mb),
    }
    text = resources.files("engines.trt").joinpath(SCRIPT_NAME).read_text("utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _shape_options(graph: Graph, batch: BatchRange, tokens: BatchRange) -> str:
    """Return trtexec's shape options; none where every shape is fixed."""
    if not any(isinstance(axis, str) for spec in graph.inputs for axis in spec.shape):
        return ""
    ranges = shape_ranges(graph.inputs, batch, tokens)
    options = []
    for option in ("min", "opt", "max"):
        shapes = ",".join(
            f"{name}:{'x'.join(str(axis) for axis in getattr(shape, option))}"
            for name, shape in ranges.items()
        )
        options.append(f"--{option}Shapes={shapes}")
    return " ".join(options)


def make_page(vision: VisionFiles, target: Target) -> str:
    """Return the page."""
    jetpack = ", ".join(
        f"JetPack {release} (TensorRT {version})" for release, version in target.jetpack.items()
    )
    needs = jetpack or f"TensorRT {target.tensorrt_min} or newer"
    missing = "".join(
        f" TensorRT {version} was shipped without kernels for sm_{target.sm}."
        for version in target.tensorrt_without
    )
    files = "\n".join(f"- `{graph.file}`, {graph.precision}" for graph in vision.files)
    return f"""# The engines of this bundle

{files}

A TensorRT engine fits one kind of GPU and one exact library version, so it is not part of the
bundle: each graph's is built on the {target.title} itself, into `{LOCAL_DIRECTORY}/`.

    ./build_on_device.sh

Needed: {needs}.{missing}
`python3 -m engines.doctor .` says what is missing and how to get it, and whether there is memory
enough.

`./build_on_device.sh --trtexec` makes the equal call of NVIDIA's own tool; `--print` shows it.

Beside each engine lie `*.plan.json` (what built it, for what, when; checked at each start) and
`*.plan.layers.json` (its layers and their types). After an update of JetPack, TensorRT or the
driver the engines no longer fit; the error says so, and `python3 -m engines.build . --rebuild`
builds them again.
"""
