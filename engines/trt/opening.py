"""Open the plans of a budget: one, or the tower's, the reducer's and the projector's."""

from __future__ import annotations

from contextlib import ExitStack

from engines.bundle import Bundle
from engines.chained_session import ChainedSession, SharedStages
from engines.errors import EngineError
from engines.gpu import NoGpu, find_gpu, read_power_mode
from engines.manifest import Graph, VisionGraph
from engines.session import Session
from engines.targets import Target
from engines.trt.cuda_memory import open_cuda_runtime
from engines.trt.library import load_library_for
from engines.trt.plan import find_plan, machine_here, read_plan, read_record
from engines.trt.session import TrtSession
from engines.trt.wiring import Wiring


def open_plans(
    bundle: Bundle,
    graph: VisionGraph,
    target: Target,
    *,
    trust: bool = False,
    batch: int = 1,
    shared: SharedStages | None = None,
) -> Session:
    """Open what runs one after the other for a budget.

    Args:
        bundle: an opened bundle.
        graph: one of its budgets.
        target: the device.
        trust: run plans that another user or machine signed.
        batch: images in one run.
        shared: the tower and the projector, where another session has opened them.

    Raises:
        EngineError: no plan, no GPU, no library, a plan for something else, or plans that were not
            built together.
    """
    common = bundle.manifest.shared
    if common is None:
        return open_trt_session(bundle, graph, target, trust=trust, batch=batch)

    def open_stage(stage: Graph, wiring: Wiring) -> TrtSession:
        return open_trt_session(bundle, stage, target, trust=trust, batch=batch, wiring=wiring)

    with ExitStack() as opened:
        owns_shared = shared is None
        if shared is None:
            names = frozenset(spec.name for spec in common.tower.outputs)
            tower = opened.enter_context(open_stage(common.tower, Wiring(on_device=names)))
            names = frozenset(spec.name for spec in common.projector.inputs)
            wiring = Wiring(tower.stream, names)
            projector = opened.enter_context(open_stage(common.projector, wiring))
            shared = SharedStages(tower, projector)
        chain = ChainedSession(
            shared, open_stage(graph, wire_reducer(shared, graph)), owns_shared=owns_shared
        )
        opened.pop_all()
        return chain


def wire_reducer(shared: SharedStages, graph: Graph) -> Wiring:
    """Return how a reducer's plan reads the tower's outputs and writes the projector's inputs.

    Raises:
        EngineError: the tower is closed.
    """
    tower, projector = shared.tower, shared.projector
    if not isinstance(tower, TrtSession) or not isinstance(projector, TrtSession):
        raise RuntimeError("the stages are of another engine")
    if tower.stream is None:
        raise EngineError("The session that owns the tower is closed; open it again.")
    lent = tower.device_tensors() | projector.device_tensors()
    read = {spec.name for spec in graph.inputs} | set(projector.input_names)
    buffers = {name: tensor for name, tensor in lent.items() if name in read}
    return Wiring(tower.stream, frozenset(buffers), buffers)


def open_trt_session(
    bundle: Bundle,
    graph: Graph,
    target: Target,
    *,
    trust: bool = False,
    batch: int = 1,
    wiring: Wiring | None = None,
) -> TrtSession:
    """Open the plan of a bundle's file that suits a number of images best.

    Args:
        bundle: an opened bundle.
        graph: one of its files.
        target: the device.
        trust: run a plan that another user or machine signed.
        batch: images in one run. More than the plan takes are run in several parts.
        wiring: for one of several stages.

    Raises:
        EngineError: no plan, no GPU, no library, or a plan for something else.
    """
    plan = find_plan(bundle, graph, target, batch)
    record = read_record(plan)
    gpu = find_gpu()
    if isinstance(gpu, NoGpu):
        raise EngineError(
            f"{plan} is a plan for sm_{record.sm} ({target.title}) and cannot run here: "
            f"{gpu.reason}. Run it on that device, or build the bundle for this machine "
            "(python -m export.build --target cpu)."
        )
    library = load_library_for(target)
    sha256 = bundle.manifest.files[graph.file].sha256
    machine = machine_here(sha256, library, target, gpu, read_power_mode())
    data, _ = read_plan(plan, machine, trust=trust)
    cache = plan.with_suffix(".kernels") if library.name == "tensorrt-rtx" else None
    return TrtSession(
        data, library, open_cuda_runtime(), kernel_cache=cache, wiring=wiring or Wiring()
    )
