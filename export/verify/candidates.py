"""Open what is compared: the vision graph of a bundle on one engine, whole and by stages.

Beside the graph that users run, a candidate holds a copy that hands out its stages on the same
engine. A TensorRT plan, and a graph that OpenVINO runs in two halves, have no such copy; only their
outputs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from calibration.agreement.stages import run_stages, tap_graph
from calibration.agreement.token_metrics import Array
from engines.bundle import Bundle
from engines.errors import EngineError, OptionError
from engines.manifest import QUANTIZED_PRECISIONS, VisionGraph
from engines.opening import open_session, target_of
from engines.ort import CUDA, OrtSession
from engines.session import Session
from runtime.vision import VisionEncoder

DEFAULT_ENGINE = "ort"


@dataclass(frozen=True)
class Stages:
    """A copy of a graph that hands out its stages."""

    session: Session
    taps: dict[str, list[str]]

    def run(self, pixel_values: Array) -> dict[str, Array]:
        """Return the values of one picture by stage."""
        return run_stages(self.session, pixel_values, self.taps)


@dataclass(frozen=True)
class Candidate:
    """A vision graph on an engine.

    Attributes:
        name: the bundle's directory, as short as it differs from the others, and
            the engine.
        bundle: where the graph is from.
        graph: the graph.
        engine: a name of `engines.opening`.
        encoder: the graph as users run it.
        stages: None where there are none.
    """

    name: str
    bundle: Bundle
    graph: VisionGraph
    engine: str
    encoder: VisionEncoder
    stages: Stages | None


def open_candidates(
    stack: ExitStack,
    graphs: Sequence[tuple[Bundle, VisionGraph]],
    engines: Sequence[str],
    *,
    threads: int | None,
    with_stages: bool,
    note: Callable[[str], None],
) -> list[Candidate]:
    """Open each graph on each engine.

    Args:
        stack: closes them.
        graphs: the graphs to compare.
        engines: names of `engines.opening`. When empty, ONNX Runtime and, where it is here,
            what the bundle's target names.
        threads: CPU threads of each.
        with_stages: open the copy that hands out its stages as well.
        note: told what is left out, and why.

    Raises:
        EngineError: an engine that was named does not open.
    """
    found: list[Candidate] = []
    folders = [bundle.root.resolve().name for bundle, _ in graphs]
    for bundle, graph in graphs:
        folder = bundle.root.resolve().name
        short = folder if folders.count(folder) == 1 else str(bundle.root)
        for engine in engines or _default_engines(bundle, note):
            try:
                session = open_session(bundle, graph, engine=engine, threads=threads)
            except EngineError as error:
                if engines or engine == DEFAULT_ENGINE:
                    raise
                note(f"{bundle.root} is not compared on {engine}, its target's engine: {error}")
                continue
            stack.enter_context(session)
            name = f"{short}, {engine}"
            stages = _open_stages(stack, bundle, graph, engine, threads) if with_stages else None
            if with_stages and stages is None:
                note(f"{name}: its stages cannot be told apart, only what comes out.")
            if engine == "openvino" and graph.precision == "fp16":
                note(f"{name}: OpenVINO computes float16 graphs in float32 here; see ort for fp16.")
            encoder = VisionEncoder(bundle, session, tokens=graph.reducer.tokens, finite=False)
            found.append(Candidate(name, bundle, graph, engine, encoder, stages))
    return found


def _default_engines(bundle: Bundle, note: Callable[[str], None]) -> Iterable[str]:
    try:
        return dict.fromkeys((DEFAULT_ENGINE, target_of(bundle).engine))
    except OptionError as error:
        note(f"{bundle.root} is compared on ONNX Runtime only: {error}")
        return (DEFAULT_ENGINE,)


def _open_stages(
    stack: ExitStack, bundle: Bundle, graph: VisionGraph, engine: str, threads: int | None
) -> Stages | None:
    opener = _STAGE_SESSIONS.get(engine)
    if opener is None or (engine == "openvino" and graph.precision in QUANTIZED_PRECISIONS):
        return None
    if graph.is_prefix:  # the stages of its file are those of more tokens
        return None
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="foveate-verify-")))
    files = [bundle.path(stage.file) for stage in bundle.stages(graph)]
    taps = tap_graph(files, folder / "stages.onnx")
    if not taps:
        return None
    session = opener(folder / "stages.onnx", threads)
    return Stages(stack.enter_context(session), taps)


def _open_ort(file: Path, threads: int | None) -> Session:
    return OrtSession(file, threads=threads)


def _open_ort_cuda(file: Path, threads: int | None) -> Session:
    return OrtSession(file, providers=[(CUDA, {"use_tf32": "0"})])


def _open_openvino(file: Path, threads: int | None) -> Session:
    from engines.openvino_session import OpenVinoSession

    return OpenVinoSession(file, threads=threads)


_STAGE_SESSIONS = {"ort": _open_ort, "ort-cuda": _open_ort_cuda, "openvino": _open_openvino}
"""Engines that run a graph with any outputs, and a quantized one as a whole."""
