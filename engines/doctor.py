"""Check whether a bundle will run on this machine: `python -m engines.doctor [BUNDLE ...]`.

Each finding says what was found and which command fixes it. The exit code is 1 when something
prevents the bundle from running.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from engines import cli
from engines.bundle import Bundle, open_bundle
from engines.device_facts import DeviceFacts, read_facts
from engines.errors import EngineError, FoveateError
from engines.finding import Finding
from engines.gpu import NoGpu
from engines.language_packages import INSTALL
from engines.manifest import Graph
from engines.memory.check import examine_memory
from engines.memory.of_bundle import MemoryOptions
from engines.targets import Target, find_target, targets_of_gpu
from engines.trt.build_memory import add_swap_command, predict_build_bytes
from engines.trt.library import TrtLibrary
from engines.trt.plan import (
    find_plan,
    list_changes,
    list_differences,
    machine_here,
    read_checked,
    read_record,
)

EXAMPLES = (
    "python -m engines.doctor",
    "python -m engines.doctor build/rover --json",
    "python -m engines.doctor build/rover --context 4096 --kv-cache q8",
)


def examine_machine(facts: DeviceFacts) -> list[Finding]:
    """Judge what is the same for every bundle."""
    gpu = facts.gpu
    findings = [
        Finding("GPU", "note", f"none: {gpu.reason}")
        if isinstance(gpu, NoGpu)
        else Finding(
            "GPU",
            "ok",
            f"{gpu.name}, sm_{gpu.sm}, {gpu.memory_bytes / 1e9:.1f} GB"
            f"{' shared with the CPU' if gpu.integrated else ''}, driver {gpu.driver}, "
            f"CUDA up to {gpu.cuda}",
        )
    ]
    if facts.board or facts.jetson_linux:
        findings.append(_examine_jetson(facts))
    findings += [
        Finding(
            "memory",
            "ok",
            f"{facts.available_bytes / 1e9:.1f} of {facts.memory_bytes / 1e9:.1f} GB available, "
            f"{facts.swap_bytes / 1e9:.1f} GB swap, {facts.disk_bytes / 1e9:.1f} GB disk",
        ),
        Finding("ahead-of-time compiler", "ok", "installed")
        if facts.compiler
        else Finding(
            "ahead-of-time compiler",
            "note",
            "not installed; only RTX targets need it",
            "python -m engines.install_trt_rtx",
        ),
    ]
    return findings


def _examine_jetson(facts: DeviceFacts) -> Finding:
    release = f"Jetson Linux {facts.jetson_linux}" if facts.jetson_linux else "no Jetson Linux"
    jetpack = f", JetPack {facts.jetpack}" if facts.jetpack else ""
    mode = f", power mode {facts.power_mode}" if facts.power_mode else ""
    slow = facts.power_mode is not None and not facts.power_mode.startswith("MAXN")
    return Finding(
        "board",
        "note" if slow else "ok",
        f"{facts.board or 'unnamed'}, {release}{jetpack}{mode}",
        "sudo nvpmodel -q --verbose lists the modes; for full speed: sudo nvpmodel -m 0 "
        "(the number of MAXN differs by board) && sudo jetson_clocks"
        if slow
        else "",
    )


def examine_target(facts: DeviceFacts, target: Target) -> list[Finding]:
    """Judge whether a target's engine can be built and run here."""
    if not target.needs_cuda:
        return [Finding("engine", "ok", f"{target.engine}: runs the ONNX file, nothing to build")]
    device = _examine_device(facts, target)
    if device is not None and target.engine == "tensorrt" and not facts.is_jetson:
        return [device]  # what is missing here is not missing there
    findings = [] if device is None else [device]
    if target.engine == "tensorrt":
        findings.append(_examine_tensorrt(facts, target))
    elif not facts.compiler:
        fix = "python -m engines.install_trt_rtx"
        findings.append(Finding("TensorRT-RTX", "problem", "not installed", fix))
    if facts.polygraphy is None:
        fix = "pip install 'foveate[tensorrt]'"
        findings.append(Finding("Polygraphy", "problem", "not installed; it builds plans", fix))
    if not facts.cuda_runtime and not isinstance(facts.gpu, NoGpu):
        fix = "sudo apt install nvidia-jetpack, or pip install nvidia-cuda-runtime-cu12"
        findings.append(Finding("CUDA runtime", "problem", "libcudart is not found", fix))
    return findings


def _is_elsewhere(facts: DeviceFacts, target: Target) -> bool:
    """Return whether this machine's GPU is not the target's."""
    return isinstance(facts.gpu, NoGpu) or facts.gpu.sm != target.sm


def _examine_device(facts: DeviceFacts, target: Target) -> Finding | None:
    """Judge the GPU; None where it is the target's."""
    gpu = facts.gpu
    if not _is_elsewhere(facts, target):
        return None
    if target.engine == "tensorrt-rtx":
        return Finding(
            "device", "note", f"not a {target.title}: the plan can be built here and runs there"
        )
    if isinstance(gpu, NoGpu):
        fix = (
            "sudo apt install nvidia-jetpack, and restart; in a container: docker run "
            "--runtime nvidia"
            if facts.is_jetson
            else f"copy the bundle to a {target.title}, and ask the doctor there"
        )
        return Finding("device", "problem", f"no GPU: {gpu.reason}", fix)
    return Finding(
        "device",
        "problem",
        f"this GPU is sm_{gpu.sm}, the bundle is for sm_{target.sm} ({target.title})",
        f"python -m engines.build BUNDLE {targets_of_gpu(gpu.sm, target.engine)}",
    )


def _examine_tensorrt(facts: DeviceFacts, target: Target) -> Finding:
    if facts.tensorrt is None:
        fix = (
            "sudo apt install python3-libnvinfer, then python3 -m venv --system-site-packages"
            if facts.is_jetson
            else "pip install tensorrt-cu12"
        )
        return Finding("TensorRT", "problem", facts.tensorrt_problem, fix)
    complaint = target.explain_unsupported_tensorrt(facts.tensorrt)
    if complaint:
        works = target.jetpack_releases
        return Finding("TensorRT", "problem", complaint, f"install {works}" if works else "")
    return Finding("TensorRT", "ok", facts.tensorrt)


def examine_bundle(
    facts: DeviceFacts, bundle: Bundle, target: Target, asked: MemoryOptions = MemoryOptions()
) -> list[Finding]:
    """Judge whether one bundle can be built and run here, and answer what is asked."""
    findings = [Finding("bundle", "ok", f"{bundle.root}: {bundle.manifest.model}, {target.name}")]
    findings += _examine_backends(facts, bundle)
    findings += examine_target(facts, target)
    if target.needs_cuda:
        to_build = []
        for graph in bundle.manifest.vision_files.files:
            plan = find_plan(bundle, graph, target)
            if plan.exists():
                findings.append(_examine_plan(facts, bundle, graph, target))
            else:
                to_build.append(bundle.graph_bytes(graph))
        if to_build:
            findings.append(_examine_build_memory(facts, max(to_build), target))
    return [*findings, examine_memory(facts, bundle, target, asked)]


def _examine_backends(facts: DeviceFacts, bundle: Bundle) -> list[Finding]:
    """Say which decoders cannot run here; only the first one, which is the default, has to."""
    models = bundle.manifest.language_models
    return [
        Finding(
            f"language backend {model.backend}",
            "problem" if model is models[0] else "note",
            facts.missing_backends[model.backend],
            INSTALL[model.backend],
        )
        for model in models
        if model.backend in facts.missing_backends
    ]


def _examine_build_memory(facts: DeviceFacts, onnx_bytes: int, target: Target) -> Finding:
    """Judge the memory of the machine that builds: this one, or one like the target."""
    needed = predict_build_bytes(onnx_bytes, (target.workspace_mb or 0) << 20)
    said = f"about {needed / 1e9:.1f} GB to build"
    if target.engine == "tensorrt" and _is_elsewhere(facts, target):
        said += f"; a {target.title} has about {target.free_bytes / 1e9:.1f} GB free"
        if not target.memory_gb or needed <= target.free_bytes:
            return Finding("build memory", "ok", said)
        return Finding(
            "build memory", "problem", said, add_swap_command(int(needed - target.free_bytes))
        )
    room = facts.available_bytes
    said += f", {room / 1e9:.1f} GB available"
    if needed <= room:
        return Finding("build memory", "ok", said)
    if needed <= room + facts.swap_bytes:
        return Finding("build memory", "note", f"{said} and swap for the rest: slow, but it fits")
    fix = add_swap_command(needed - room)
    if facts.jetson_linux:
        fix += "; also stop the desktop: sudo systemctl isolate multi-user.target"
    return Finding("build memory", "problem", said, fix)


def _examine_plan(facts: DeviceFacts, bundle: Bundle, graph: Graph, target: Target) -> Finding:
    plan = find_plan(bundle, graph, target)
    rebuild = f"python -m engines.build {bundle.root} --rebuild"
    try:
        record = read_record(plan)
        read_checked(plan, record)
    except EngineError as error:
        return Finding("plan", "problem", str(error), rebuild)
    version = facts.tensorrt if target.engine == "tensorrt" else record.library_version
    ahead = target.engine == "tensorrt-rtx" and _is_elsewhere(facts, target)
    gpu = None if ahead or isinstance(facts.gpu, NoGpu) else facts.gpu
    library = TrtLibrary(record.library, None, version or "no TensorRT")
    sha256 = bundle.manifest.files[graph.file].sha256
    machine = machine_here(sha256, library, target, gpu, facts.power_mode)
    if differences := list_differences(record, machine):
        return Finding("plan", "problem", "; ".join(differences), rebuild)
    if changes := list_changes(record, machine):
        return Finding("plan", "note", f"{plan.name}: {'; '.join(changes)}", rebuild)
    return Finding("plan", "ok", f"{plan.name}, built {record.built_at}")


def _print_findings(title: str, findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    signs = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}
    table = Table("", "", "found", title=title, title_justify="left")
    for item in findings:
        table.add_row(signs[item.status], item.about, escape(item.found))
    Console().print(table)
    for item in findings:  # apart from the table, which would break commands into pieces
        if item.fix:
            print(f"{item.about}: {item.fix}")
    print()


def main(
    bundles: Annotated[
        list[Path] | None, typer.Argument(help="Bundles to check; none for the machine alone.")
    ] = None,
    *,
    target: Annotated[str | None, typer.Option(help="Device; left out, each bundle's own.")] = None,
    targets: Annotated[Path | None, typer.Option(help="Your own targets (TOML).")] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Positions of the KV cache; left out, room for one question and its answer."
        ),
    ] = None,
    kv_cache: cli.KvCacheOption = "f16",
    visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Which vision graph; left out, the largest budget.")
    ] = None,
    backend: cli.BackendOption = None,
    as_json: cli.JsonOption = False,
) -> int:
    """Tell what this machine is, what is missing for each bundle, and the commands that fix it.

    Ends with 1 when something stands in the way.
    """
    facts = read_facts((bundles or [Path()])[0] if bundles and bundles[0].is_dir() else Path())
    sections: list[tuple[str, list[Finding]]] = [("This machine", examine_machine(facts))]
    if target and not bundles:
        device = find_target(target, targets)
        sections.append((f"For {device.name}", examine_target(facts, device)))
    asked = MemoryOptions(context, kv_cache, backend=backend, tokens=visual_tokens)
    for path in bundles or []:
        try:
            bundle = open_bundle(path)
            device = find_target(target or bundle.manifest.target, targets)
            sections.append((str(path), examine_bundle(facts, bundle, device, asked)))
        except FoveateError as error:
            sections.append((str(path), [Finding("bundle", "problem", str(error))]))
    problems = sum(item.status == "problem" for _, found in sections for item in found)
    if as_json:
        cli.print_json(
            {
                "problems": problems,
                "sections": [
                    {"about": title, "findings": [dataclasses.asdict(item) for item in found]}
                    for title, found in sections
                ],
            }
        )
    else:
        for title, found in sections:
            _print_findings(title, found)
    return 1 if problems else 0


if __name__ == "__main__":
    cli.run(main, EXAMPLES)
