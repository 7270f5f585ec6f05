"""`python -m engines.build BUNDLE`: build the TensorRT plan of a bundle's vision graph.

Enters: a bundle. Leaves: a plan, its sidecar, a layer report and a timing cache in the bundle's
`local/` folder, which belongs to this machine. A plan that is there and fits is left alone; one
that does not fit is refused with both values named, and replaced with `--rebuild`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from engines import cli
from engines.bundle import Bundle, open_bundle
from engines.device_facts import read_memory
from engines.errors import EngineError
from engines.gpu import find_gpu
from engines.manifest import VisionGraph
from engines.targets import Target, find_target
from engines.trt.batch_profile import ANY_BATCH, BatchRange, parse_batch, shape_ranges
from engines.trt.build_memory import predict_build_bytes
from engines.trt.build_progress import ProgressCallback
from engines.trt.builder import BuildOptions, build_plan, choose_gpu, layers_path, workspace_of
from engines.trt.library import load_library_for
from engines.trt.plan import (
    REBUILD_HINT,
    PlanRecord,
    adopt_plan,
    is_signed_here,
    list_differences,
    machine_here,
    plan_path,
    read_record,
)


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for."""

    batch: BatchRange = ANY_BATCH
    workspace_mb: int | None = None
    rebuild: bool = False
    trust: bool = False


@dataclass(frozen=True)
class PlanOutcome:
    """What was done: ``built``, ``adopted`` or ``current``."""

    action: str
    plan: Path
    record: PlanRecord


def prepare_plan(
    bundle: Bundle,
    graph: VisionGraph,
    target: Target,
    request: PlanRequest,
    on_progress: ProgressCallback | None = None,
) -> PlanOutcome:
    """Make sure that a plan for the target is there and was built from this graph.

    Raises:
        EngineError: a plan is there that does not fit and ``rebuild`` was not asked for, or it
            cannot be built here.
        OptionError: the target has no plans, or does not take the graph's precision.
    """
    target.check_precision(graph.precision)
    options = BuildOptions(
        onnx=bundle.path(graph.file),
        onnx_sha256=bundle.manifest.files[graph.file].sha256,
        plan=plan_path(bundle, graph, target),
        target=target,
        precision=graph.precision,
        inputs=graph.inputs,
        batch=request.batch,
        workspace_bytes=request.workspace_mb * (1 << 20) if request.workspace_mb else None,
    )
    if options.plan.exists() and not request.rebuild:
        record = _check_existing(options, trust=request.trust)
        if is_signed_here(record):
            return PlanOutcome("current", options.plan, record)
        return PlanOutcome("adopted", options.plan, adopt_plan(options.plan))
    result = build_plan(options, on_progress)
    return PlanOutcome("built", result.plan, result.record)


def _check_existing(options: BuildOptions, *, trust: bool) -> PlanRecord:
    record = read_record(options.plan)
    gpu = choose_gpu(options.target, find_gpu())
    library = load_library_for(options.target)
    machine = machine_here(options.onnx_sha256, library, options.target, gpu)
    differences = list_differences(record, machine)
    for name, wanted in shape_ranges(options.inputs, options.batch).items():
        if record.profile.get(name) != wanted:
            differences.append(
                f"{name}: the plan takes {record.profile.get(name)}, asked for is {wanted}"
            )
    if record.workspace_bytes != workspace_of(options):
        differences.append(
            f"workspace: the plan was built with {record.workspace_bytes >> 20} MB, asked for is "
            f"{workspace_of(options) >> 20} MB"
        )
    if differences:
        raise EngineError(f"{options.plan}: {'; '.join(differences)}. {REBUILD_HINT}")
    if not trust and not is_signed_here(record):
        raise EngineError(
            f"{options.plan} was not built by this user on this machine. {REBUILD_HINT}, or pass "
            "--trust if you know who built it: a plan is code that TensorRT runs."
        )
    return record


@contextmanager
def progress_on_stderr(title: str) -> Iterator[ProgressCallback]:
    """Show a build's phase and share on the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda phase, done: bar.update(task, description=phase, completed=done)


def main(
    bundle: Annotated[Path, typer.Argument(help="A directory that export.build wrote.")],
    *,
    target: Annotated[
        str | None, typer.Option(help="Device; left out, the one the bundle was exported for.")
    ] = None,
    targets: Annotated[Path | None, typer.Option(help="Your own targets (TOML).")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Which graph, where the bundle holds several.")
    ] = None,
    batch: Annotated[str, typer.Option(help="smallest/tuned/largest, or one size.")] = "1/1/8",
    workspace: Annotated[
        int | None, typer.Option(min=1, help="Builder scratch memory, MB; left out, the target's.")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Replace the plan.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Adopt a plan built elsewhere: it runs as your code.")
    ] = False,
    as_json: cli.JsonOption = False,
) -> None:
    """Build the TensorRT plan of a bundle's vision graph, on the device that will run it.

    The precision is the graph's own. RTX targets are built ahead of time, without a GPU.
    """
    opened = open_bundle(bundle)
    graph = opened.vision(tokens)
    device = find_target(target or opened.manifest.target, targets)
    request = PlanRequest(parse_batch(batch), workspace, rebuild, trust)
    _warn_of_memory(opened, graph, device)
    with progress_on_stderr(f"Building for {device.name}") as progress:
        outcome = prepare_plan(opened, graph, device, request, progress)
    if as_json:
        cli.print_json(_json_of(outcome))
        return
    said = {"built": "Built", "adopted": "Adopted", "current": "Already built"}[outcome.action]
    record = outcome.record
    print(
        f"{said}: {outcome.plan}\n"
        f"  {record.library} {record.library_version}, sm_{record.sm}, {record.precision}, "
        f"{record.plan_bytes / 1e6:.1f} MB, {record.build_seconds:.1f} s\n"
        f"  layers: {layers_path(outcome.plan)}"
    )


def _warn_of_memory(bundle: Bundle, graph: VisionGraph, target: Target) -> None:
    """Say beforehand that memory may not do: a builder that runs out is killed without a word."""
    memory = read_memory(Path("/proc/meminfo"))
    room = memory.get("MemAvailable", 0) + memory.get("SwapFree", 0)
    onnx_bytes = bundle.graph_bytes(graph)
    needed = predict_build_bytes(onnx_bytes, (target.workspace_mb or 0) << 20)
    if 0 < room < needed:
        print(
            f"warning: building takes about {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB of memory "
            "and swap are free. If it is killed: python -m engines.doctor tells how to add swap.",
            file=sys.stderr,
        )


def _json_of(outcome: PlanOutcome) -> dict[str, Any]:
    return {
        "action": outcome.action,
        "plan": str(outcome.plan),
        "layers": str(layers_path(outcome.plan)),
        "record": outcome.record.model_dump(mode="json"),
    }


if __name__ == "__main__":
    cli.run(
        main,
        [
            "python -m engines.build build/rover",
            "python -m engines.build build/rover --target rtx-4090 --batch 1/4/16",
            "python -m engines.build build/rover --rebuild --json",
        ],
    )
