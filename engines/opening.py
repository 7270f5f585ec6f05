"""Open a bundle's vision graph on the engine of its target, or on another one.

An engine that cannot run is an error. Nothing falls back to a slower engine by itself.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from engines.bundle import Bundle
from engines.chained_session import ChainedSession, SharedStages
from engines.errors import EngineError, OptionError
from engines.graph_contents import check_graph_contents
from engines.manifest import INTEGER_PRECISIONS, Graph, VisionGraph
from engines.session import Session, Stage
from engines.targets import Target, find_target, load_targets

ENGINES = (
    *("ort", "ort-cuda", "ort-tensorrt"),
    *("openvino", "openvino-bf16"),
    *("tensorrt", "tensorrt-rtx"),
)
TARGETS_VARIABLE = "FOVEATE_TARGETS"
"""Environment variable that names the user's own targets file, for commands without --targets."""
_TENSORRT = "TensorrtExecutionProvider"


def open_session(
    bundle: Bundle,
    graph: VisionGraph | None = None,
    *,
    engine: str | None = None,
    threads: int | None = None,
    trust: bool = False,
    batch: int = 1,
    beside: Session | None = None,
) -> Session:
    """Open a graph of a bundle.

    Args:
        bundle: from `open_bundle`.
        graph: one of its graphs; the first when left out.
        engine: one of `ENGINES`; the target's own when left out.
        threads: CPU threads, for engines on the CPU.
        trust: run a TensorRT plan that another user or machine signed.
        batch: images in one run, which choose among the TensorRT plans that were built; every
            session takes any number of them.
        beside: a session that this function opened for another budget of the bundle, on the same
            engine. What both need is not loaded again, and is freed when that one is closed.

    Raises:
        OptionError: no such engine or target, or the engine cannot take the graph's precision.
        BundleError: the graph holds what our exporters never write.
        EngineError: the engine or its plan is not there, or does not run on this machine.
    """
    chosen = graph or bundle.vision()
    name = engine or target_of(bundle).engine
    if name not in ENGINES:
        near = get_close_matches(name, ENGINES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise OptionError(f"--engine {name}: expected one of {', '.join(ENGINES)}.{hint}")
    shared = beside.shared if isinstance(beside, ChainedSession) else None
    if name in ("tensorrt", "tensorrt-rtx"):
        return _open_plans(bundle, chosen, name, trust, batch, shared)

    def open_stage(stage: Graph) -> Stage:
        return _open_graph(bundle, stage, name, threads)

    if bundle.manifest.shared is None:
        return open_stage(chosen)
    if shared is not None:
        return ChainedSession(shared, open_stage(chosen), owns_shared=False)
    tower, reducer, projector = map(open_stage, bundle.stages(chosen))
    return ChainedSession(SharedStages(tower, projector), reducer, owns_shared=True)


def _open_graph(bundle: Bundle, graph: Graph, name: str, threads: int | None) -> Stage:
    """Open one ONNX file as it is."""
    check_graph_contents(bundle, graph.file)
    if name == "ort":
        from engines.ort import OrtSession

        return OrtSession(bundle.path(graph.file), threads=threads)
    if name in ("ort-cuda", "ort-tensorrt"):
        return _open_ort_on_gpu(bundle, graph, name)
    return _open_openvino(bundle, graph, name, threads)


def target_of(bundle: Bundle) -> Target:
    """Return the target a bundle was built for.

    Raises:
        OptionError: it is not known here.
    """
    try:
        return find_target(bundle.manifest.target, _own_targets())
    except OptionError as error:
        raise OptionError(
            f"{bundle.root} was built for the target {bundle.manifest.target}, which is not known "
            f"here. Name its file in {TARGETS_VARIABLE}, or choose with --engine: "
            f"{', '.join(ENGINES)}."
        ) from error


def _own_targets() -> Path | None:
    named = os.environ.get(TARGETS_VARIABLE)
    return Path(named) if named else None


def _open_openvino(bundle: Bundle, graph: Graph, name: str, threads: int | None) -> Stage:
    """Open OpenVINO; a quantized graph's rest is BF16 where the CPU has it, FP32 stays FP32."""
    from engines.openvino_session import OpenVinoSession, cpu_has_bf16

    rounded = graph.precision in INTEGER_PRECISIONS and cpu_has_bf16()
    shared = bundle.manifest.shared
    if shared is not None and graph.file != shared.tower.file:
        rounded, name = False, "openvino"  # what follows the scores is FP32
    return OpenVinoSession(
        bundle.path(graph.file),
        threads=threads,
        rest="bf16" if rounded or name == "openvino-bf16" else "fp32",
        cache=bundle.local / "openvino",
    )


def _open_plans(
    bundle: Bundle,
    graph: VisionGraph,
    name: str,
    trust: bool,
    batch: int,
    shared: SharedStages | None,
) -> Session:
    from engines.trt.opening import open_plans

    target = _target_of_plan(bundle, graph, name)
    try:
        return open_plans(bundle, graph, target, trust=trust, batch=batch, shared=shared)
    except EngineError as error:
        raise EngineError(
            f"{error} To run the graph without TensorRT, slower: --engine ort."
        ) from error


def _target_of_plan(bundle: Bundle, graph: VisionGraph, name: str) -> Target:
    """Return the target whose plan is to be opened: that of this GPU, if there is one.

    It need not be the bundle's own: `engines.build --target` builds for others as well.
    """
    from engines.gpu import Gpu, find_gpu
    from engines.trt.plan import find_plan

    own, gpu = target_of(bundle), find_gpu()
    known = [own, *load_targets(_own_targets()).values()]
    able = [target for target in known if target.engine == name]
    built = [target for target in able if find_plan(bundle, graph, target).exists()]
    fitting = [target for target in built if isinstance(gpu, Gpu) and target.sm == gpu.sm]
    if fitting or built or own.engine == name:
        return (fitting or built or [own])[0]
    raise OptionError(
        f"--engine {name}: the bundle's target {own.name} has {own.engine}, and no {name} plan was "
        f"built of it. Build one: python -m engines.build {bundle.root} --target, with one of "
        f"{', '.join(target.name for target in able)}."
    )


def _open_ort_on_gpu(bundle: Bundle, graph: Graph, name: str) -> Stage:
    """Open ONNX Runtime on a GPU, with TF32 off: a rounded score may keep another patch.

    Its CUDA provider has an option for that; TensorRT is told by NVIDIA's environment variable.
    """
    from engines.ort import CUDA, OrtSession, Provider

    providers: list[Provider] = [(CUDA, {"use_tf32": "0"})]
    if name == "ort-tensorrt":
        if graph.precision not in ("fp32",):
            raise OptionError(
                f"--engine ort-tensorrt: ONNX Runtime gives TensorRT leave to round the "
                f"{graph.precision} graph's FP32 selection too. Use --engine tensorrt, which "
                "keeps every type as exported, or --engine ort-cuda."
            )
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
        cache = bundle.local / "ort-tensorrt"
        cache.mkdir(parents=True, exist_ok=True)
        options = {
            "trt_engine_cache_enable": "True",  # "1" is refused
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(cache),
        }
        providers.insert(0, (_TENSORRT, options))
    return OrtSession(bundle.path(graph.file), providers=providers)
