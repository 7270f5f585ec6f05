"""What NVIDIA's parser and builder make of every graph: `python -m benchmarks.tensorrt_table`.

For each reducer, precision and compute capability: fused attentions of all, kernels, layers that
only quantize, bytes that the kernels read and write, size of the plan, seconds, peak memory. Every
row is a process of its own, so that peaks do not add up. The weights are random,
which changes neither operators nor shapes nor sizes. `--write docs/tensorrt.md` replaces the table
there.

Rows are kept in `build/tensorrt_table.jsonl`, so an interrupted run continues where it stood and a
run of one size adds to the others. Delete the file to measure anew.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Annotated, get_args

import onnx_ir as ir
import typer

from calibration.scales.attention import find_attentions
from engines import cli
from engines.errors import FoveateError
from engines.manifest import Precision, TensorSpec
from engines.targets import find_target
from engines.trt.builder import PlanTask, build_plan
from engines.trt.library import load_library

SIZES = {"small": "TINY", "clip-l-336": "CLIP_L_336"}
SMS = (89, 120)
PRECISIONS = ("fp32", "fp16", "int8", "mixed", "fp8")
SHIPPED = ("fp16", "mixed", "fp8")
"""What a build makes for a TensorRT target; measured unless others are asked for."""
KEPT = Path("build/tensorrt_table.jsonl")
BEGIN, END = "<!-- tensorrt_table begins -->", "<!-- tensorrt_table ends -->"


Key = tuple[str, str, int]  # graph, precision, compute capability


@dataclass(frozen=True)
class Row:
    """One graph through one builder."""

    graph: str
    precision: str
    sm: int
    builder: str
    onnx_mb: float
    attentions: str | None = None
    kernels: int | None = None
    quantization_left: int | None = None
    moved_mb: float | None = None
    parse_seconds: float | None = None
    build_seconds: float | None = None
    plan_mb: float | None = None
    peak_mb: float | None = None
    problem: str = ""


def build_one(file: Path, precision: Precision, sm: int) -> Row:
    """Parse and build one graph in this process; the float32 graph lies beside it."""
    from benchmarks import random_graphs

    inputs = tuple(
        TensorSpec.model_validate(item) for item in json.loads((file.parent / "inputs").read_text())
    )
    library = load_library("tensorrt-rtx")
    target = find_target("rtx-4090").model_copy(update={"sm": sm})
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    row = Row(
        graph=file.parent.name,
        precision=precision,
        sm=sm,
        builder=f"{library.name} {library.version}",
        onnx_mb=round(file.stat().st_size / 1e6, 1),
    )
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "vision.plan"
        try:
            result = build_plan(PlanTask(file, sha256, plan, target, precision, inputs))
        except FoveateError as error:
            return replace(row, problem=str(error))
    engine = result.layers.engine
    if engine is None:
        raise RuntimeError("the build log told of no layers")
    attentions = find_attentions(ir.load(file.with_name(random_graphs.FP32_NAME)))
    return replace(
        row,
        attentions=f"{engine.fused_attentions} of {len(attentions)}",
        kernels=engine.kernels,
        quantization_left=engine.quantization_left,
        moved_mb=round(engine.moved_bytes / 1e6, 1),
        parse_seconds=round(result.layers.parse_seconds, 2),
        build_seconds=round(result.record.build_seconds, 1),
        plan_mb=round(result.record.plan_bytes / 1e6, 1),
        peak_mb=round(_peak_bytes() / 1e6),
    )


def _peak_bytes() -> int:
    """Return this program's own peak; getrusage would count what started it."""
    status = Path("/proc/self/status").read_text("utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def read_rows() -> dict[Key, Row]:
    """Return the rows that earlier runs kept, the last one of each key."""
    if not KEPT.exists():
        return {}
    rows = (Row(**json.loads(line)) for line in KEPT.read_text("utf-8").splitlines())
    return {(row.graph, row.precision, row.sm): row for row in rows}


def measure_reducer(
    reducer: str, size: str, precisions: Sequence[str], sms: Sequence[int], rows: dict[Key, Row]
) -> None:
    """Add to `rows` what the builder makes of one reducer's graphs, where a row is missing."""
    from benchmarks import random_graphs

    name = f"{reducer}, {size}"
    missing = [key for key in product([name], precisions, sms) if key not in rows]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / name
        place.mkdir()
        config = getattr(random_graphs, SIZES[size])
        fp32, inputs = random_graphs.write_graph(place, reducer, config)
        (place / "inputs").write_text(json.dumps([item.model_dump() for item in inputs]))
        for precision, of_precision in groupby(missing, lambda key: key[1]):
            file = random_graphs.write_typed_graph(fp32, precision)
            for key in of_precision:
                print(f"{name} {precision} sm_{key[2]} ...", file=sys.stderr)
                rows[key] = build_in_process_of_its_own(file, precision, key[2])
                with KEPT.open("a", encoding="utf-8") as kept:
                    kept.write(json.dumps(asdict(rows[key])) + "\n")


def build_in_process_of_its_own(file: Path, precision: str, sm: int) -> Row:
    """Run `build_one` where its peak memory is its own."""
    command = [sys.executable, "-m", "benchmarks.tensorrt_table", "--one", str(file)]
    command += ["--precision", precision, "--sm", str(sm)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def _place_in_table(row: Row) -> tuple[int, str, int, int]:
    reducer, size = row.graph.split(", ")
    return list(SIZES).index(size), reducer, PRECISIONS.index(row.precision), row.sm


def _cell(row: Row, number: float | None) -> str:
    return f"{number:g}" if number is not None else "refused" if row.problem else "-"


def table_of(rows: list[Row]) -> str:
    """Return the rows as a Markdown table, the compute capabilities of a graph in one line."""
    lines = [
        "| graph | precision | SM | attentions fused | kernels | Q/DQ left | MB moved | ONNX MB | "
        "plan MB | built, s | peak MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (graph, precision), alike in groupby(rows, lambda row: (row.graph, row.precision)):
        of_graph = list(alike)
        columns = [
            [str(row.sm) for row in of_graph],
            [row.attentions or "-" for row in of_graph],
            [_cell(row, row.kernels) for row in of_graph],
            [_cell(row, row.quantization_left) for row in of_graph],
            [_cell(row, row.moved_mb) for row in of_graph],
            [f"{of_graph[0].onnx_mb:g}"],
            [_cell(row, row.plan_mb) for row in of_graph],
            [_cell(row, row.build_seconds) for row in of_graph],
            [_cell(row, row.peak_mb) for row in of_graph],
        ]
        # One number where the compute capabilities agree.
        cells = " | ".join(" / ".join(dict.fromkeys(column)) for column in columns)
        lines.append(f"| {graph} | {precision} | {cells} |")
    builders = ", ".join(sorted({row.builder for row in rows}))
    problems = [f"{row.graph} {row.precision}: {row.problem}" for row in rows if row.problem]
    said = [f"Parser and builder: {builders}, ahead of time, {platform.machine()}, no GPU.", ""]
    return "\n".join([*said, *lines, *([""] if problems else []), *problems])


def main(
    *,
    size: Annotated[list[str] | None, typer.Option(help=", ".join(SIZES))] = None,
    reducer: Annotated[list[str] | None, typer.Option(help="Left out, all of them.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help=", ".join(PRECISIONS))] = None,
    sm: Annotated[list[int] | None, typer.Option(help="89, 120")] = None,
    write: Annotated[Path | None, typer.Option(help="Page to put the table into.")] = None,
    one: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: cli.JsonOption = False,
) -> int:
    """Build every graph with NVIDIA's ahead-of-time compiler and print one table."""
    precisions = precision or list(SHIPPED)
    sms = sm or list(SMS)
    if one is not None:
        (chosen,) = (item for item in get_args(Precision) if item == precisions[0])
        print(json.dumps(asdict(build_one(one, chosen, sms[0]))))
        return 0
    from export.reducers import REDUCERS

    KEPT.parent.mkdir(exist_ok=True)
    kept = read_rows()
    sizes, reducers = size or ["small"], reducer or list(REDUCERS)
    for chosen_size, chosen_reducer in product(sizes, reducers):
        measure_reducer(chosen_reducer, chosen_size, precisions, sms, kept)
    rows = sorted(kept.values(), key=_place_in_table)
    if write is not None:
        before, _, rest = write.read_text("utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        write.write_text(f"{before}{BEGIN}\n{table_of(rows)}\n{END}{after}", encoding="utf-8")
    if as_json:
        cli.print_json({"rows": [asdict(row) for row in rows]})
    else:
        print(table_of(rows))
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    cli.run(
        main,
        [
            "python -m benchmarks.tensorrt_table",
            "python -m benchmarks.tensorrt_table --size clip-l-336 --reducer visionzip --sm 89",
        ],
    )
