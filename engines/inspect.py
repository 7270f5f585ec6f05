"""Print what a bundle holds and check its files: `python -m engines.inspect BUNDLE`."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from engines import cli
from engines.bundle import Bundle, open_bundle
from engines.errors import EngineError
from engines.manifest import VisionGraph
from engines.trt.plan import PlanRecord, read_record

EXAMPLES = (
    "python -m engines.inspect build/pocket",
    "python -m engines.inspect build/pocket --json --trust",
)


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return what a bundle holds, as one JSON object."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.root),
        "model": manifest.model,
        "target": manifest.target,
        "schema_version": manifest.schema_version,
        "vision": [
            {
                "file": graph.file,
                "reducer": graph.reducer.name,
                "options": graph.reducer.options,
                "visual_tokens": graph.reducer.tokens,
                "patches": graph.patch_rows * graph.patch_columns,
                "precision": graph.precision,
                "opset": graph.opset,
            }
            for graph in manifest.vision
        ],
        "shared": None if manifest.shared is None else manifest.shared.model_dump(mode="json"),
        "language_models": [model.model_dump() for model in manifest.language_models],
        "context_length": manifest.text.context_length,
        "preprocessing": manifest.preprocessing.model_dump(),
        "tiles": None if manifest.tiles is None else manifest.tiles.model_dump(mode="json"),
        "calibration_digest": manifest.calibration_digest,
        "plans": {name: record.model_dump(mode="json") for name, record in list_plans(bundle)},
        "bytes": {name: record.bytes for name, record in sorted(manifest.files.items())},
        "versions": manifest.versions,
    }


def list_plans(bundle: Bundle) -> list[tuple[str, PlanRecord]]:
    """List the TensorRT plans in a bundle; `engines.doctor` judges them, and damaged sidecars."""
    found = []
    for plan in sorted(bundle.local.glob("*.plan")):
        with suppress(EngineError):
            found.append((plan.name, read_record(plan)))
    return found


def _page(bundle: Bundle, verified: str) -> str:
    manifest = bundle.manifest
    total = sum(record.bytes for record in manifest.files.values())
    lines = [f"{manifest.model}, built for {manifest.target} ({total / 1e6:,.1f} MB)", "", "Vision"]
    if manifest.shared is not None:
        around = f"{manifest.shared.tower.file}, then a reducer, then"
        lines.append(f"  {around} {manifest.shared.projector.file}; of each budget the reducer:")
    lines += [_graph_line(graph) for graph in manifest.vision]
    if manifest.tiles is not None:
        most = bundle.most_visual_tokens(bundle.largest_vision())
        shared = manifest.tiles.picture_tokens
        told = "" if shared is None else f"they share {shared} tokens by content; "
        lines.append(
            f"  each picture is {bundle.most_squares} squares at most, a view of it all and tiles; "
            f"{told}at most {most} visual tokens with newlines"
        )
    if bundle.clips is not None:
        graph = manifest.vision[0]
        rows, columns = bundle.clips.pooled(graph.patch_rows, graph.patch_columns)
        lines.append(
            "  a clip has one place in the prompt; where no token is left out, each frame is "
            f"pooled to {rows} x {columns} tokens"
        )
    if manifest.calibration_digest:
        lines.append(f"  calibrated on the frames {manifest.calibration_digest[:12]}...")
    lines += ["", "Language model"]
    lines += [
        f"  {model.file}  {model.precision}, backend {model.backend}, "
        f"context {manifest.text.context_length:,}"
        for model in manifest.language_models
    ]
    plans = list_plans(bundle)
    if plans:
        lines += ["", f"Engines built here ({bundle.local})"]
    lines += [
        f"  {name}  {plan.library} {plan.library_version}, sm_{plan.sm}, {plan.precision}, "
        f"{plan.plan_bytes / 1e6:,.1f} MB, {plan.built_at}"
        for name, plan in plans
    ]
    lines += ["", "Files"]
    lines += [f"  {record.bytes:>15,}  {name}" for name, record in sorted(manifest.files.items())]
    made = ", ".join(f"{tool} {version}" for tool, version in manifest.versions.items())
    lines += ["", f"Built with {made}.", verified, "", "Next:"]
    lines += [f'  python -m runtime.ask {bundle.root} picture.jpg "What is in the picture?"']
    return "\n".join(lines)


def _graph_line(graph: VisionGraph) -> str:
    patches = graph.patch_rows * graph.patch_columns
    options = ", ".join(f"{name} {value}" for name, value in graph.reducer.options.items())
    return (
        f"  {graph.file}  {graph.reducer.name}{f' ({options})' if options else ''}: "
        f"{graph.reducer.tokens} visual tokens from {patches} patches, {graph.precision}, "
        f"opset {graph.opset}{f', the first of {graph.leaves}' if graph.is_prefix else ''}"
    )


def main(
    bundle: Annotated[Path, typer.Argument(help="Directory that export.build wrote.")],
    verify: cli.VerifyOption = True,
    as_json: cli.JsonOption = False,
) -> None:
    """Say what a bundle holds and whether every file is as it was built.

    Ends with 2 and one paragraph that names each missing, changed or added file when it is not.
    """
    started = time.perf_counter()
    opened = open_bundle(bundle, verify=verify)
    milliseconds = (time.perf_counter() - started) * 1e3
    if as_json:
        cli.print_json(
            describe_bundle(opened) | {"verified": verify, "milliseconds": round(milliseconds, 1)}
        )
        return
    checked = "SHA-256 of every file is" if verify else "Names and sizes are"
    print(_page(opened, f"{checked} as built (checked in {milliseconds:.0f} ms)."))


if __name__ == "__main__":
    cli.run(main, EXAMPLES)
