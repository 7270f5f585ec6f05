"""Build the TensorRT plans of a bundle's vision graphs: `python -m engines.build BUNDLE`.

Each file gets a plan, a sidecar and a layer report in the bundle's `local/` folder, which belongs
to this machine, and a timing cache. Budgets may share files. A plan that fits is kept. A plan that
does not fit is refused with both values named, and replaced with `--rebuild`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from engines import cli
from engines.bundle import Bundle, open_bundle
from engines.device_facts import read_memory
from engines.errors import EngineError, OptionError
from engines.gpu import find_gpu
from engines.graph_contents import check_graph_contents
from engines.manifest import Graph
from engines.targets import Target, find_target
from engines.trt.batch_profile import (
    ONE_IMAGE,
    BatchRange,
    parse_batch,
    token_range,
    usual_batch,
)
from engines.trt.build_memory import add_swap_command, predict_build_bytes
from engines.trt.build_progress import ProgressCallback
from engines.trt.builder import PlanTask, build_plan, choose_gpu, layers_path, workspace_of
from engines.trt.library import load_library_for
from engines.trt.plan import (
    PlanRecord,
    adopt_plan,
    check_signature,
    is_signed_here,
    list_differences,
    machine_here,
    plan_path,
    read_checked,
    read_record,
    rebuild_hint,
)

EXAMPLES = (
    "python -m engines.build build/rover",
    "python -m engines.build build/rover --target rtx-4090 --batch 4",
    "python -m engines.build build/rover --rebuild --json",
    "python -m engines.build build/rover --optimization-level 5",
)


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for."""

    batch: BatchRange = ONE_IMAGE
    workspace_mb: int | None = None
    optimization_level: int | None = None
    rebuild: bool = False
    trust: bool = False


@dataclass(frozen=True)
class PlanOutcome:
    """What was done: ``built``, ``adopted`` or ``current``."""

    action: str
    plan: Path
    record: PlanRecord


def build_engines(
    bundle: Bundle | str | Path,
    target: str | None = None,
    request: PlanRequest = PlanRequest(),
    *,
    tokens: int | None = None,
    targets_file: Path | None = None,
    progress: Callable[[str], AbstractContextManager[ProgressCallback | None]] = (
        lambda title: nullcontext()
    ),
    done: Callable[[PlanOutcome], None] = lambda outcome: None,
) -> list[PlanOutcome]:
    """Make sure that a bundle's vision graphs have their TensorRT plans.

    Args:
        bundle: from `open_bundle`, or its directory.
        target: the device; left out, the one the bundle was exported for.
        request: how to build.
        tokens: one budget of several; left out, plans for all.
        targets_file: a TOML file of the user's own targets.
        progress: opened around each plan with its title; gives what is told the phase.
        done: told of each plan.

    Raises:
        EngineError, OptionError: as `prepare_plan`.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    files = opened.manifest.vision_files.files
    graphs = files if tokens is None else opened.stages(opened.vision(tokens))
    device = find_target(target or opened.manifest.target, targets_file)
    _warn_of_memory(opened, graphs, device, request)
    outcomes = []
    for graph in graphs:
        with progress(f"{graph.file} for {device.name}") as tell:
            outcomes.append(prepare_plan(opened, graph, device, request, tell))
        done(outcomes[-1])
    return outcomes


def prepare_plan(
    bundle: Bundle,
    graph: Graph,
    target: Target,
    request: PlanRequest,
    on_progress: ProgressCallback | None = None,
) -> PlanOutcome:
    """Make sure that a plan for the target is there and was built from this graph.

    Raises:
        EngineError: a plan is there that is damaged or does not fit and ``rebuild`` was not asked
            for, or it cannot be built here.
        OptionError: the target has no plans, or does not take the graph's precision.
        BundleError: the graph holds what our exporters never write.
    """
    _check_target(bundle, graph, target)
    options = PlanTask(
        onnx=bundle.path(graph.file),
        onnx_sha256=bundle.manifest.files[graph.file].sha256,
        plan=plan_path(bundle, graph, target, request.batch.max),
        target=target,
        precision=graph.precision,
        inputs=graph.inputs,
        batch=request.batch,
        tokens=token_range(bundle.manifest.vision_files.token_counts),
        workspace_bytes=request.workspace_mb * (1 << 20) if request.workspace_mb else None,
        optimization_level=request.optimization_level,
    )
    if options.plan.exists() and not request.rebuild:
        record = _check_existing(options, trust=request.trust)
        if is_signed_here(record):
            return PlanOutcome("current", options.plan, record)
        return PlanOutcome("adopted", options.plan, adopt_plan(options.plan))
    check_graph_contents(bundle, graph.file)
    result = build_plan(options, on_progress)
    return PlanOutcome("built", result.plan, result.record)


def _check_target(bundle: Bundle, graph: Graph, target: Target) -> None:
    if not target.needs_cuda:
        raise OptionError(
            f"--target {target.name}: its engine, {target.engine}, runs the ONNX file as it is, so "
            f"there is no plan to build. Use {bundle.root} as it is, or name a GPU's target "
            "(python -m engines.targets)."
        )
    if graph.precision not in target.precisions:
        raise OptionError(
            f"{bundle.root}: {graph.file} is {graph.precision}, but {target.name} ({target.title}) "
            f"takes {', '.join(target.precisions)}. Export it again: python -m export.build "
            f"--target {target.name} --precision {target.default_precision}, or name another "
            "--target (python -m engines.targets)."
        )


def _check_existing(options: PlanTask, *, trust: bool) -> PlanRecord:
    record = read_record(options.plan)
    gpu = choose_gpu(options.target, find_gpu())
    library = load_library_for(options.target)
    machine = machine_here(options.onnx_sha256, library, options.target, gpu)
    differences = list_differences(record, machine)
    for name, wanted in options.profile.items():
        if record.profile.get(name) != wanted:
            differences.append(
                f"{name}: the plan takes {record.profile.get(name)}, asked for is {wanted}"
            )
    if record.workspace_bytes != workspace_of(options):
        differences.append(
            f"workspace: the plan was built with {record.workspace_bytes >> 20} MB, asked for is "
            f"{workspace_of(options) >> 20} MB"
        )
    if record.optimization_level != options.optimization_level:
        differences.append(
            f"optimization level: the plan was built at {_level(record.optimization_level)}, asked "
            f"for is {_level(options.optimization_level)}"
        )
    if differences:
        raise EngineError(
            f"{options.plan}: {'; '.join(differences)}. {rebuild_hint(options.plan)}."
        )
    read_checked(options.plan, record)
    if not trust:
        check_signature(options.plan, record)
    return record


def _level(level: int | None) -> str:
    return "TensorRT's default" if level is None else str(level)


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
        int | None, typer.Option(help="One budget of several; left out, plans for all.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Images in one run: one size (4 for four cameras), or min/opt/max. "
            "Each max size has a plan of its own, and the runtime takes the one that fits. Left "
            "out, one picture: 1, or 1/N/N where the bundle cuts a picture into at most N squares."
        ),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="Builder scratch memory, MB; left out, the target's.")
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=5,
            help="How long to look for fast kernels: 0 builds in seconds and runs slower, 5 tries "
            "every kernel; left out, TensorRT's default (3).",
        ),
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Replace the plan.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Adopt a plan built elsewhere: it runs as your code.")
    ] = False,
    as_json: cli.JsonOption = False,
) -> None:
    """Build the TensorRT plans of a bundle's vision graphs, on the device that will run them.

    The precision is each graph's own. RTX targets are built ahead of time, without a GPU.
    """
    opened = open_bundle(bundle)
    sizes = parse_batch(batch) if batch is not None else usual_batch(opened.most_squares)
    outcomes = build_engines(
        opened,
        target,
        PlanRequest(sizes, workspace, optimization_level, rebuild, trust),
        tokens=tokens,
        targets_file=targets,
        progress=progress_on_stderr,
        done=_print_outcome if not as_json else lambda outcome: None,
    )
    if as_json:
        cli.print_json({"plans": [_json_of(outcome) for outcome in outcomes]})


def _print_outcome(outcome: PlanOutcome) -> None:
    said = {"built": "Built", "adopted": "Adopted", "current": "Already built"}[outcome.action]
    record = outcome.record
    print(
        f"{said}: {outcome.plan}\n"
        f"  {record.library} {record.library_version}, sm_{record.sm}, {record.precision}, "
        f"{record.plan_bytes / 1e6:.1f} MB, {record.build_seconds:.1f} s\n"
        f"  layers: {layers_path(outcome.plan)}"
    )


def _warn_of_memory(
    bundle: Bundle, graphs: Sequence[Graph], target: Target, request: PlanRequest
) -> None:
    """Warn if memory may not suffice: a builder that runs out is killed without a message."""
    to_build = [
        bundle.graph_bytes(graph)
        for graph in graphs
        if request.rebuild or not plan_path(bundle, graph, target, request.batch.max).exists()
    ]
    memory = read_memory(Path("/proc/meminfo"))
    room = memory.get("MemAvailable", 0) + memory.get("SwapFree", 0)
    workspace_mb = request.workspace_mb or target.workspace_mb or 0
    needed = predict_build_bytes(max(to_build, default=0), workspace_mb << 20)
    if to_build and 0 < room < needed:
        print(
            f"warning: building takes about {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB of memory "
            f"and swap are free. More swap: {add_swap_command(needed - room)}",
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
    cli.run(main, EXAMPLES)
