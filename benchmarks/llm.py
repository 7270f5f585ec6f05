"""The language backends at TinyLlama's size: prefill with 64 and 576 visual tokens, and decoding.

Random weights take as long as trained ones. Each backend has a process of its own, so that its peak
memory is its own. All are loaded first and then measured in turns, round after round, and a ratio
is the median of the rounds': what else runs on the machine slows both of its sides. Prefill is the
fastest of the rounds, decoding the median. Goals: prefill of 576 at least 7 times that of 64;
decoding at least as fast as llama.cpp in Q4_K_M; OpenVINO prefills no slower than PyTorch in BF16
and decodes no slower than ONNX Runtime.

    python -m benchmarks.llm
    python -m benchmarks.llm --json --threads 4 --keep build/tinyllama
    python -m benchmarks.llm --backends ort,transformers --repeats 5
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.random_language_model import Shape, write_random_bundle
from engines import cli
from engines.bundle import Bundle, open_bundle
from engines.errors import FoveateError
from runtime.language.parts import Embeddings

VISUAL_TOKENS = (64, 576)
TEXT_TOKENS = 32
BACKENDS = ("ort", "llamacpp", "openvino", "openvino-int8", "transformers-bf16")
"""Measured if no others are asked for; `transformers`, in float32, takes 7 GB."""
GOALS = {
    "prefill_576_over_64": 7.0,
    "decode_ort_over_llamacpp": 1.0,
    "decode_ort_over_transformers": 3.0,
    "prefill_64_openvino_over_transformers-bf16": 1.0,
    "prefill_576_openvino_over_transformers-bf16": 1.0,
    "decode_openvino_over_ort": 1.0,
}
"""Speeds, so that more is better; those whose backends are not measured are left out."""


@dataclass(frozen=True)
class Round:
    """What one backend took in one round.

    Attributes:
        prefill_ms: by number of visual tokens; 32 tokens of text are with them.
        prefill_cpu_ms: the same in processor time, of all threads together.
        decode_tokens_per_second: after 64 visual tokens.
        decode_cpu_ms: processor time of one token.
        peak_memory_mb: resident, of the whole process, so far.
    """

    prefill_ms: dict[int, float]
    prefill_cpu_ms: dict[int, float]
    decode_tokens_per_second: float
    decode_cpu_ms: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Times:
    """What one backend took in all rounds."""

    backend: str
    rounds: tuple[Round, ...]

    def prefill_ms(self, count: int) -> float:
        """Return the fastest prefill with so many visual tokens."""
        return min(each.prefill_ms[count] for each in self.rounds)

    def prefill_cpu_ms(self, count: int) -> float:
        """Return the least processor time of a prefill with so many visual tokens."""
        return min(each.prefill_cpu_ms[count] for each in self.rounds)

    @property
    def decode_tokens_per_second(self) -> float:
        """The median of the rounds."""
        return statistics.median(each.decode_tokens_per_second for each in self.rounds)

    @property
    def decode_cpu_ms(self) -> float:
        """The median processor time of one token."""
        return statistics.median(each.decode_cpu_ms for each in self.rounds)

    @property
    def peak_memory_mb(self) -> float:
        """The most memory that its process held."""
        return max(each.peak_memory_mb for each in self.rounds)


Forward = Callable[[Embeddings], int]
"""Rows appended to the conversation -> the likeliest next token."""


def measure(bundle: Bundle, backend: str, threads: int, answer: int) -> Iterator[Round]:
    """Measure one backend in this process, a round for each time the iterator is asked.

    Args:
        bundle: with a decoder for it.
        backend: its name in `BACKENDS`, or ``"transformers"``.
        threads: of the CPU.
        answer: tokens to decode.
    """
    from runtime.language.embeddings import EmbeddingTable

    kind, _, dtype = backend.partition("-")
    start = _transformers if kind == "transformers" else _ours
    restart, forward = start(bundle, kind, threads, dtype)
    table = EmbeddingTable(bundle)
    width = bundle.manifest.text.hidden_size
    random = np.random.default_rng(0)
    prompts = {
        count: random.normal(0, 0.02, (count + TEXT_TOKENS, width)).astype(np.float32)
        for count in reversed(VISUAL_TOKENS)  # 64 last: decoding goes on from there
    }
    for rows in prompts.values():  # what is set up at first use is no part of a round
        restart()
        forward(rows)
    while True:
        wall, cpu = {}, {}
        for count, rows in prompts.items():
            restart()
            began, begun = time.perf_counter(), time.process_time()
            token = forward(rows)
            wall[count] = round((time.perf_counter() - began) * 1e3, 1)
            cpu[count] = round((time.process_time() - begun) * 1e3, 1)
        began, begun = time.perf_counter(), time.process_time()
        for _ in range(answer):
            token = forward(table.rows(np.array([token])))
        speed = answer / (time.perf_counter() - began)
        spent = (time.process_time() - begun) * 1e3 / answer
        yield Round(wall, cpu, round(speed, 2), round(spent, 2), _peak_memory_mb())


def _peak_memory_mb() -> float:
    """Return the most memory this process held; getrusage would count its parent's too."""
    status = Path("/proc/self/status").read_text("ascii").splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
    return round(int(peak) / 1024, 0)


def _ours(bundle: Bundle, name: str, threads: int, _: str) -> tuple[Callable[[], None], Forward]:
    from runtime.backends.opening import open_backend

    backend = open_backend(bundle, name, threads=threads, context_length=1024)
    return lambda: backend.rewind(0), lambda rows: int(backend.prefill([rows]).argmax())


def _transformers(
    bundle: Bundle, _: str, threads: int, dtype: str
) -> tuple[Callable[[], None], Forward]:
    import torch
    from transformers import DynamicCache

    from export.checkpoint.llava import open_checkpoint

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(bundle.root.parent / "checkpoint")
    chosen = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = checkpoint.language_model(chosen)
    cache = DynamicCache()

    def restart() -> None:
        nonlocal cache
        cache = DynamicCache()

    @torch.inference_mode()
    def forward(rows: Embeddings) -> int:
        embeds = torch.from_numpy(rows)[None].to(chosen)  # [1, N, D]
        out = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    return restart, forward


def compare(times: list[Times]) -> dict[str, float]:
    """Return the ratios that the goals are about, each the median of the rounds'."""
    by_name = {each.backend: each for each in times}
    few, many = VISUAL_TOKENS
    ratios = {}
    if "ort" in by_name:
        rounds = by_name["ort"].rounds
        ratios["prefill_576_over_64"] = _median(
            each.prefill_ms[many] / each.prefill_ms[few] for each in rounds
        )
    for name in GOALS:
        what, _, sides = name.rpartition("_over_")[0].rpartition("_")
        ours, theirs = sides, name.rpartition("_over_")[2]
        if ours not in by_name or theirs not in by_name:
            continue
        pairs = list(zip(by_name[ours].rounds, by_name[theirs].rounds, strict=True))
        if what == "decode":
            speeds = (a.decode_tokens_per_second / b.decode_tokens_per_second for a, b in pairs)
        else:
            count = int(what.removeprefix("prefill_"))
            speeds = (b.prefill_ms[count] / a.prefill_ms[count] for a, b in pairs)
        ratios[name] = _median(speeds)
    return ratios


def _median(values: Iterator[float]) -> float:
    return round(statistics.median(values), 2)


class _Apart:
    """A backend in a process of its own, that measures a round when it is told."""

    def __init__(self, bundle: Path, backend: str, threads: int, answer: int) -> None:
        command = [sys.executable, "-m", "benchmarks.llm", "--keep", str(bundle.parent)]
        command += ["--only", backend, "--threads", str(threads), "--answer-tokens", str(answer)]
        self.backend = backend
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._read()  # loaded

    def measure(self) -> Round:
        print("round", file=self._process.stdin, flush=True)
        fields = self._read()
        for name in ("prefill_ms", "prefill_cpu_ms"):
            fields[name] = {int(count): ms for count, ms in fields[name].items()}
        return Round(**fields)

    def _read(self) -> Any:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip()[-600:]
            raise FoveateError(f"Measuring {self.backend} failed: {said}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


def _serve(bundle: Path, backend: str, threads: int, answer: int) -> None:
    """Measure a round for each line of standard input."""
    folder = f"{bundle}-int8" if backend.endswith("-int8") else bundle
    rounds = measure(open_bundle(folder, verify=False), backend, threads, answer)
    print(json.dumps("loaded"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(vars(next(rounds))), flush=True)


def main(
    threads: Annotated[int, typer.Option(help="CPU threads of every backend.")] = 2,
    answer_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    backends: Annotated[str, typer.Option(help="Which, with commas.")] = ",".join(BACKENDS),
    keep: Annotated[
        Path | None, typer.Option(help="Directory for the random model, used again if it is there.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Measure one backend in this process.", hidden=True)
    ] = None,
    as_json: cli.JsonOption = False,
) -> int:
    """Time the language backends on a random model of 1.1 billion weights (about 8 GB of disk).

    Exit code 1 says that a goal was missed.
    """
    with ExitStack() as stack:
        directory = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundle = directory / "bundle"
        if not bundle.is_dir():
            print("Writing a random model and its bundles ...", file=sys.stderr)
            write_random_bundle(directory, Shape())
        if only is not None:
            _serve(bundle, only, threads, answer_tokens)
            return 0
        apart = []
        for backend in backends.split(","):
            print(f"Loading {backend} ...", file=sys.stderr)
            apart.append(_Apart(bundle, backend, threads, answer_tokens))
            stack.callback(apart[-1].close)
        rounds: dict[str, list[Round]] = {each.backend: [] for each in apart}
        for number in range(1, repeats + 1):
            for each in apart:
                print(f"Round {number} of {repeats}: {each.backend} ...", file=sys.stderr)
                rounds[each.backend].append(each.measure())
    times = [Times(backend, tuple(made)) for backend, made in rounds.items()]
    ratios = compare(times)
    _tell(times, ratios, as_json)
    return 0 if all(ratio >= GOALS[name] for name, ratio in ratios.items()) else 1


def _tell(times: list[Times], ratios: dict[str, float], as_json: bool) -> None:
    if as_json:
        measured = [dataclasses.asdict(each) for each in times]
        document: dict[str, Any] = {"backends": measured, "load": os.getloadavg()}
        cli.print_json(document | {"ratios": ratios, "goals": GOALS})
        return
    print(
        f"{'backend':20}{'prefill 64':>12}{'prefill 576':>12}{'decode':>10}"
        f"{'CPU: 64':>12}{'576':>12}{'a token':>10}{'memory':>11}"
    )
    for each in times:
        wall = "".join(f"{each.prefill_ms(count):>9.0f} ms" for count in VISUAL_TOKENS)
        cpu = "".join(f"{each.prefill_cpu_ms(count):>9.0f} ms" for count in VISUAL_TOKENS)
        print(
            f"{each.backend:20}{wall}{each.decode_tokens_per_second:>8.1f}/s{cpu}"
            f"{each.decode_cpu_ms:>7.0f} ms{each.peak_memory_mb:>8.0f} MB"
        )
    for name, ratio in ratios.items():
        print(f"{name:46}{ratio:6.2f}  (goal: at least {GOALS[name]:g})")


if __name__ == "__main__":
    cli.run(main, ("`python -m benchmarks.llm --keep build/tinyllama`",))
