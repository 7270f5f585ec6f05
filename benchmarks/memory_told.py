"""Compare the memory that `engines.estimate` counts with what llama.cpp and ONNX Runtime hold.

    python -m tests.real_size.random_llava build/tinyllama --size tinyllama
    python -m export.build --model build/tinyllama --llm-backend ort,llamacpp --out build/t
    python -m benchmarks.memory_told build/t --model tinyllama-1.1b

Each part of a bundle runs in a process of its own: its vision graph, and the decoder of each
backend with its KV cache filled to the last position. *Held* is the most anonymous memory at any
time, and of the mapped files those pages that are read while it answers, which Linux tells by the
pages' accessed bits. That is what has to stay in memory; other pages of mapped files were read once
when the model was loaded, and the system takes them back at need. `VmHWM` counts them too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from engines import cli
from engines.bundle import Bundle, open_bundle
from engines.errors import FoveateError
from engines.estimate import find_shape
from engines.memory.decoder import DecoderPlan, decoder_parts
from engines.memory.of_model import decoder_shape, vision_bytes
from engines.memory.parts import MemoryNeed
from engines.memory.process import process_parts
from engines.memory.vision import VisionPlan, vision_parts
from engines.roofline import CLIP_L_336_POSITIONS

Part = Literal["vision", "ort", "llamacpp", "llamacpp q8"]
PARTS: tuple[Part, ...] = ("vision", "ort", "llamacpp", "llamacpp q8")
GOAL = 0.1
_LOOK_EVERY_S = 0.02
_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Row:
    """One part, in bytes.

    Attributes:
        part: what ran.
        context: positions of the KV cache, all filled; 0 for a vision graph.
        estimated: what the count says.
        held: what the process held.
        resident_peak: `VmHWM`, with pages of files that were read once.
    """

    part: str
    context: int
    estimated: int
    held: int
    resident_peak: int

    @property
    def ratio(self) -> float:
        """Estimated over held."""
        return self.estimated / self.held


def estimate(model: str, part: Part, context: int) -> int:
    """Count what one part takes, as `engines.estimate` does."""
    parts = process_parts(cuda=False)
    if part == "vision":
        weights = vision_bytes(find_shape(model).hidden, "fp32")
        plan = VisionPlan("ort", weights, CLIP_L_336_POSITIONS, "fp32")
        return MemoryNeed((*parts, *vision_parts(plan))).total_bytes
    backend, _, cache = part.partition(" ")
    decoder = DecoderPlan(
        backend=backend,
        precision="int4" if backend == "ort" else "q4_k_m",
        positions=context,
        kv_cache="q8" if cache else "f16",
    )
    shape = decoder_shape(find_shape(model))
    return MemoryNeed((*parts, *decoder_parts(shape, decoder))).total_bytes


def hold(bundle: Bundle, part: Part, context: int) -> dict[str, int]:
    """Run one part in this process and return what it held, and its peak."""
    most = [0]

    def look() -> None:
        while True:
            most[0] = max(most[0], _anonymous_bytes())
            time.sleep(_LOOK_EVERY_S)

    threading.Thread(target=look, daemon=True).start()
    answer = _open_vision(bundle) if part == "vision" else _open_decoder(bundle, part, context)
    answer(True)
    (_PROC / "clear_refs").write_text("1")
    answer(False)
    read = _bytes_read_of_files()
    peak = re.search(r"VmHWM:\s+(\d+)", (_PROC / "status").read_text())
    if peak is None:
        raise FoveateError("/proc/self/status has no VmHWM: this benchmark needs Linux.")
    return {"held": most[0] + read, "resident_peak": int(peak[1]) * 1024}


def _open_vision(bundle: Bundle) -> Callable[[bool], object]:
    from runtime.vision import VisionEncoder

    encoder = VisionEncoder(bundle, threads=2)
    picture = np.zeros((480, 640, 3), np.uint8)
    return lambda _: encoder.encode([picture])


def _open_decoder(bundle: Bundle, part: Part, context: int) -> Callable[[bool], object]:
    """Return what fills the cache, or else answers a short prompt."""
    from runtime.backends.opening import open_backend

    name, _, cache = part.partition(" ")
    kv_cache: Literal["f16", "q8"] = "q8" if cache else "f16"
    backend = open_backend(bundle, name, threads=2, context_length=context, kv_cache=kv_cache)
    width = bundle.manifest.text.hidden_size
    rows = np.random.default_rng(0).normal(0, 0.02, (context - 1, width)).astype(np.float32)

    def answer(whole: bool) -> None:
        backend.rewind(0)
        backend.prefill([rows if whole else rows[:32]])
        backend.prefill([np.array([5])])

    return answer


def _anonymous_bytes() -> int:
    resident, shared = map(int, (_PROC / "statm").read_text().split()[1:3])
    return (resident - shared) * 4096


def _bytes_read_of_files() -> int:
    """Return the pages of mapped files whose accessed bit is set."""
    total = referenced = 0
    of_file = False
    for line in (_PROC / "smaps").read_text().splitlines():
        head = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (\d+)", line)
        if head:
            of_file = head[1] != "0"
        elif of_file and line.startswith("Referenced:"):
            referenced = int(line.split()[1]) * 1024
        elif of_file and line.startswith("Anonymous:"):
            total += max(0, referenced - int(line.split()[1]) * 1024)
    return total


def measure(bundle: Path, model: str, part: Part, context: int) -> Row:
    """Measure one part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory_told", str(bundle), "--model", model]
    command += ["--context", str(context), "--only", part, "--here"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FoveateError(f"Measuring {part} failed: {done.stderr.strip()[-600:]}")
    held = json.loads(done.stdout)
    context = 0 if part == "vision" else context
    return Row(part, context, estimate(model, part, context), **held)


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle with both decoders, for the CPU.")],
    *,
    model: Annotated[str, typer.Option(help="Its shape; see engines.estimate.")] = "llava-1.5-7b",
    context: Annotated[int, typer.Option(min=64, help="Positions, all of them filled.")] = 1024,
    only: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}, with a comma; all.")] = "",
    here: Annotated[bool, typer.Option("--here", hidden=True)] = False,
    as_json: cli.JsonOption = False,
) -> int:
    """Print estimated and held memory of each part of a bundle.

    Exit code 1 says that an estimate is off by more than 10 %.
    """
    chosen = [part for part in PARTS if not only or part in only.split(",")]
    if here:
        cli.print_json(hold(open_bundle(bundle, verify=False), chosen[0], context))
        return 0
    rows = []
    for part in chosen:
        print(f"{part} ...", file=sys.stderr)
        rows.append(measure(bundle, model, part, context))
    if as_json:
        cli.print_json({"rows": [asdict(row) | {"ratio": row.ratio} for row in rows]})
    else:
        print("| part | context | estimated, MB | held, MB | estimated / held | VmHWM, MB |")
        print("|---|---:|---:|---:|---:|---:|")
        for row in rows:
            print(
                f"| {row.part} | {row.context or '-'} | {row.estimated / 1e6:.0f} | "
                f"{row.held / 1e6:.0f} | {row.ratio:.2f} | {row.resident_peak / 1e6:.0f} |"
            )
    return 0 if all(abs(row.ratio - 1) <= GOAL for row in rows) else 1


if __name__ == "__main__":
    cli.run(main, ["python -m benchmarks.memory_told build/t --model tinyllama-1.1b"])
