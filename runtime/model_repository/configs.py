"""The configurations of the three Triton models that turn a picture into visual tokens.

`NAME_preprocess` makes `pixel_values` of the bytes of a picture, `NAME_vision_N` is the vision
graph with N visual tokens, and the ensemble `NAME_N` is both. Names, shapes and types are those of
the bundle's graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from engines.bundle import Bundle
from engines.errors import BundleError, OptionError
from engines.manifest import TensorSpec, VisionGraph
from runtime.model_repository.text_format import Value, Word, text_from_message

PICTURE = "picture"
"""Input of the ensemble: the bytes of a picture file."""
MARK = "# Written by `foveate triton`; it writes it again with --overwrite."

Backend = Literal["onnxruntime", "tensorrt", "python"]
_TYPES = {
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "bool": "TYPE_BOOL",
}
_LATEST = -1
_Message = Mapping[str, Value]


@dataclass(frozen=True)
class RepositoryOptions:
    """What is served, and how it is batched.

    Attributes:
        name: how the names of the models begin.
        vision: which of Triton's backends runs the vision graph; None: `tensorrt` where the
            bundle's target has TensorRT, else `onnxruntime`. `python` runs it with this package's
            own engines.
        engine: of the backend `python`: which of our engines; None: the target's own.
        visual_tokens: of a bundle with several graphs the one with so many; None: all of them.
        max_batch: most pictures in one run; None: 8, or what the TensorRT plan takes.
        queue_delay_us: microseconds to wait for more pictures before a run.
    """

    name: Annotated[str, typer.Option(help="How the names of the models begin.")] = "foveate"
    vision: Annotated[
        Backend | None,
        typer.Option(
            help="Triton's backend that runs the vision graph: onnxruntime, tensorrt, or python "
            "(this package's own engines); left out, what the bundle's target has.",
        ),
    ] = None
    engine: Annotated[
        str | None,
        typer.Option(help="Of the backend python: the engine, as in `foveate ask --engine`."),
    ] = None
    visual_tokens: Annotated[
        int | None,
        typer.Option(
            "--visual-tokens", min=1, help="One vision graph of several; left out, all of them."
        ),
    ] = None
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Most pictures in one run; left out, 8 or what the plan takes."),
    ] = None
    queue_delay_us: Annotated[
        int, typer.Option(min=0, help="Microseconds to wait for more pictures before a run.")
    ] = 1000

    def __post_init__(self) -> None:
        if not self.name.replace("_", "").replace("-", "").isalnum() or not self.name.isascii():
            raise OptionError(
                f"--name {self.name!r}: expected letters, digits, - and _ alone; it begins the "
                "names of folders."
            )
        if self.engine is not None and self.vision != "python":
            raise OptionError("--engine is of --vision python alone. Leave it out.")


def preprocess_name(options: RepositoryOptions) -> str:
    """Return the name of the model that makes `pixel_values`."""
    return f"{options.name}_preprocess"


def vision_name(options: RepositoryOptions, graph: VisionGraph) -> str:
    """Return the name of the model that is a vision graph."""
    return f"{options.name}_vision_{graph.reducer.tokens}"


def ensemble_name(options: RepositoryOptions, graph: VisionGraph) -> str:
    """Return the name of the model that makes visual tokens of a picture."""
    return f"{options.name}_{graph.reducer.tokens}"


def preprocess_config(bundle: Bundle, options: RepositoryOptions, max_batch: int) -> str:
    """Return `config.pbtxt` of the model that makes `pixel_values`."""
    pixel_values = _pixel_values(bundle, bundle.vision(options.visual_tokens))
    message: dict[str, Value] = {
        "name": preprocess_name(options),
        "backend": "python",
        "max_batch_size": max_batch,
        "input": _picture(),
        "output": _tensor(pixel_values),
        "dynamic_batching": {},
        "instance_group": {"count": 1, "kind": Word("KIND_CPU")},
        "parameters": _parameters(preprocessing=bundle.preprocessing.model_dump_json()),
    }
    return _text(message)


def vision_config(
    bundle: Bundle,
    graph: VisionGraph,
    options: RepositoryOptions,
    backend: Backend,
    max_batch: int,
) -> str:
    """Return `config.pbtxt` of the model that is a vision graph.

    Raises:
        BundleError: the graph has no batch as its first axis.
    """
    message: dict[str, Value] = {
        "name": vision_name(options, graph),
        "backend": backend,
        "max_batch_size": max_batch,
        "input": _tensor(_pixel_values(bundle, graph)),
        "output": [_tensor(spec, reshape=True) for spec in _outputs(bundle, graph)],
        "dynamic_batching": {"max_queue_delay_microseconds": options.queue_delay_us},
    }
    if backend == "onnxruntime":
        message["default_model_filename"] = "model.onnx"
    elif backend == "tensorrt":
        message["default_model_filename"] = "model.plan"
    else:
        message["parameters"] = _parameters(
            bundle=str(bundle.root.resolve()),
            visual_tokens=str(graph.reducer.tokens),
            engine=options.engine or "",
            max_batch=str(max_batch),
        )
    return _text(message)


def ensemble_config(
    bundle: Bundle, graph: VisionGraph, options: RepositoryOptions, max_batch: int
) -> str:
    """Return `config.pbtxt` of the model that makes visual tokens of a picture."""
    pixel_values = _pixel_values(bundle, graph).name
    outputs = _outputs(bundle, graph)
    steps = [
        _step(preprocess_name(options), [PICTURE], [pixel_values]),
        _step(vision_name(options, graph), [pixel_values], [spec.name for spec in outputs]),
    ]
    message: dict[str, Value] = {
        "name": ensemble_name(options, graph),
        "platform": "ensemble",
        "max_batch_size": max_batch,
        "input": _picture(),
        "output": [_tensor(spec) for spec in outputs],
        "ensemble_scheduling": {"step": steps},
    }
    return _text(message)


def _text(message: _Message) -> str:
    return f"{MARK}\n{text_from_message(message)}"


def _step(model: str, inputs: list[str], outputs: list[str]) -> _Message:
    return {
        "model_name": model,
        "model_version": _LATEST,
        "input_map": [{"key": name, "value": name} for name in inputs],
        "output_map": [{"key": name, "value": name} for name in outputs],
    }


def _picture() -> _Message:
    return {"name": PICTURE, "data_type": Word("TYPE_STRING"), "dims": [1]}


def _tensor(spec: TensorSpec, *, reshape: bool = False) -> _Message:
    """Return a tensor without its batch; one number for each picture is told as [1]."""
    sizes = [-1 if isinstance(axis, str) else axis for axis in spec.shape[1:]]
    tensor: dict[str, Value] = {
        "name": spec.name,
        "data_type": Word(_TYPES[spec.dtype]),
        "dims": sizes or [1],
    }
    if reshape and not sizes:
        tensor["reshape"] = {}
    return tensor


def _parameters(**values: str) -> list[_Message]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def _pixel_values(bundle: Bundle, graph: VisionGraph) -> TensorSpec:
    return _checked(bundle, graph, bundle.stages(graph)[0].inputs)[0]


def _outputs(bundle: Bundle, graph: VisionGraph) -> tuple[TensorSpec, ...]:
    """Return what leaves the last of the files; what they hand on to each other does not."""
    shared = bundle.manifest.shared
    if shared is None:
        return _checked(bundle, graph, graph.outputs)
    handed = {spec.name for spec in shared.projector.inputs}
    left = tuple(spec for spec in graph.outputs if spec.name not in handed)
    tokens = tuple(
        spec.model_copy(update={"shape": (spec.shape[0], graph.leaves, *spec.shape[2:])})
        for spec in shared.projector.outputs
    )
    return _checked(bundle, graph, (*tokens, *left))


def _checked(
    bundle: Bundle, graph: VisionGraph, specs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    fixed = [spec.name for spec in specs if not spec.shape or isinstance(spec.shape[0], int)]
    if fixed:
        raise BundleError(
            f"{bundle.root}: {', '.join(fixed)} of {graph.file} has no batch as its first axis, "
            "and Triton batches there. Build the bundle again with `python -m export.build`."
        )
    return specs
