"""Every TensorRT name and call in our code exists, with that arity, in 10.3, 10.13, 10.16 and 11.4.

The code is read, not run: each attribute of the bindings, and each call on an object of them, is
found in the syntax tree by the name of the variable that holds it.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tensorrt_api import Api, UnavailableError, load_api, pinned_versions

pytestmark = pytest.mark.trt
TRT = Path(__file__).parents[2] / "engines/trt"
SOURCES = ("session.py", "builder.py", "build_progress.py", "layer_report.py", "logger.py")
CLASS_OF_VARIABLE = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "layer": "ILayer",
    "tensor_of_layer": "ITensor",
    "config": "IBuilderConfig",
}
THROUGH_POLYGRAPHY = {
    # what its loaders call for us, and with how many arguments
    ("Builder",): 1,
    ("Builder", "create_network"): 1,
    ("Builder", "create_builder_config"): 0,
    ("Builder", "create_optimization_profile"): 0,
    ("Builder", "build_serialized_network"): 2,
    ("IOptimizationProfile", "set_shape"): 4,
    ("IBuilderConfig", "add_optimization_profile"): 1,
    ("IBuilderConfig", "set_memory_pool_limit"): 2,
    ("IBuilderConfig", "create_timing_cache"): 1,
    ("IBuilderConfig", "set_timing_cache"): 2,
    ("IBuilderConfig", "get_timing_cache"): 0,
    ("ITimingCache", "combine"): 2,
    ("ITimingCache", "serialize"): 0,
    ("OnnxParser",): 2,
    ("OnnxParser", "parse_from_file"): 1,
    ("OnnxParser", "get_error"): 1,
    ("init_libnvinfer_plugins",): 2,
}
NAMES_THROUGH_POLYGRAPHY = (
    ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
    ("IBuilderConfig", "profiling_verbosity"),
    ("IBuilderConfig", "progress_monitor"),
    ("OnnxParser", "num_errors"),
    ("IProgressMonitor", "phase_start"),
    ("IProgressMonitor", "phase_finish"),
    ("IProgressMonitor", "step_complete"),
)


@dataclass(frozen=True)
class Use:
    """One place where our code touches the bindings."""

    where: str
    path: tuple[str, ...]
    positional: int | None = None
    """None where it is not called."""
    keywords: tuple[str, ...] = ()


@functools.cache
def api_of(version: str) -> Api | str:
    try:
        return load_api(version)
    except UnavailableError as error:
        return str(error)


@pytest.fixture(params=list(pinned_versions()))
def api(request: pytest.FixtureRequest) -> Api:
    found = api_of(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def holder_of(node: ast.expr) -> str | None:
    """Return "engine" for ``engine``, ``self._engine`` and ``self.engine``."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr.lstrip("_") if node.value.id == "self" else None
    return None


def path_of(node: ast.expr) -> tuple[str, ...] | None:
    """Return ("Logger", "ERROR") for `trt.Logger.ERROR`, ("ICudaEngine", "x") for `engine.x`."""
    if not isinstance(node, ast.Attribute):
        return None
    holder = holder_of(node.value)
    if holder == "trt":
        return (node.attr,)
    if holder in CLASS_OF_VARIABLE:
        return (CLASS_OF_VARIABLE[holder], node.attr)
    inner = path_of(node.value)
    return (*inner, node.attr) if inner and len(inner) == 1 else None


def list_uses() -> Iterator[Use]:
    for name in SOURCES:
        tree = ast.parse((TRT / name).read_text("utf-8"))
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (path := path_of(node.func)):
                if any(isinstance(item, ast.Starred) for item in node.args):
                    continue
                keywords = tuple(str(item.arg) for item in node.keywords)
                yield Use(f"{name}:{node.lineno}", path, len(node.args), keywords)
            elif isinstance(node, ast.Attribute) and id(node) not in called:
                path = path_of(node)
                if path is not None:
                    yield Use(f"{name}:{node.lineno}", path)


USES = list(list_uses())


def test_the_walk_finds_what_we_use() -> None:
    paths = {use.path for use in USES}
    for expected in (
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_tensor_address"),
        ("ICudaEngine", "get_tensor_profile_shape"),
        ("Runtime", "deserialize_cuda_engine"),
        ("INetworkDefinition", "num_layers"),
        ("EngineInspector", "get_engine_information"),
        ("MemoryPoolType", "WORKSPACE"),
        ("ProfilingVerbosity", "DETAILED"),
        ("LayerInformationFormat", "JSON"),
        ("IBuilderConfig", "clear_flag"),
        ("BuilderFlag", "TF32"),
        ("TensorIOMode", "INPUT"),
        ("ILogger", "Severity"),
    ):
        assert expected in paths
    assert len(USES) > 25


def test_every_name_exists(api: Api) -> None:
    wanted = [(use.where, use.path) for use in USES]
    wanted += [("polygraphy", path) for path in (*THROUGH_POLYGRAPHY, *NAMES_THROUGH_POLYGRAPHY)]
    missing = [f"{where} trt.{'.'.join(path)}" for where, path in wanted if not api.has(*path)]
    assert not missing, f"TensorRT {api.version} lacks {missing}"


def test_every_call_has_an_arity_that_exists(api: Api) -> None:
    calls = [
        (use.where, use.path, use.positional, use.keywords)
        for use in USES
        if use.positional is not None
    ]
    calls += [("polygraphy", path, count, ()) for path, count in THROUGH_POLYGRAPHY.items()]
    wrong = []
    for where, path, positional, keywords in calls:
        if path[-1] == "__init__":  # its signature leaves self out
            continue
        signatures = api.signatures(*path)
        if not any(signature.takes(positional, keywords) for signature in signatures):
            wrong.append(f"{where} trt.{'.'.join(path)} with {positional} {keywords}: {signatures}")
    assert not wrong, f"TensorRT {api.version}: {wrong}"


def test_a_wrong_call_would_be_found(api: Api) -> None:
    assert not any(item.takes(2, ()) for item in api.signatures("ICudaEngine", "get_tensor_name"))
    assert not any(item.takes(0, ("name",)) for item in api.signatures("Runtime"))
    assert not api.has("ICudaEngine", "get_binding_name")
    assert not api.has("BuilderFlag", "NO_SUCH_FLAG")


def test_what_tensorrt_11_took_away_is_not_used() -> None:
    gone = {("BuilderFlag", "FP16"), ("BuilderFlag", "INT8"), ("IBuilderConfig", "int8_calibrator")}
    assert not gone & {use.path for use in USES}
