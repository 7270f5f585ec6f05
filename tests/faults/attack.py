"""Hostile inputs tried in a process of their own, so that an abort, a hang or a leak is seen.

An attack makes its inputs from their numbers, so that a failure is named by one. A child tries them
in turn under a limit of memory and says what came of each; where it dies or falls silent, the input
it was at is the failure, and another child goes on behind it. Failing inputs are kept in `seeds/`,
and are tried before all others from then on.
"""

from __future__ import annotations

import importlib
import os
import queue
import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from engines.errors import FoveateError

SEEDS = Path(__file__).parent / "seeds"
_ROOT = Path(__file__).parents[2]
_LARGEST_SEED_BYTES = 64_000
_START_S = 120.0
"""For the child's imports, on a machine that is busy."""


@dataclass(frozen=True)
class Attack:
    """One kind of hostile input.

    Attributes:
        make: from its number, the bytes of an input.
        probe: what is attacked: takes the bytes; `FoveateError` is a refusal, and any other
            exception a failure.
    """

    make: Callable[[int], bytes]
    probe: Callable[[bytes], None]


@dataclass
class Tally:
    """What became of the inputs.

    Attributes:
        outcomes: taken, refused, abort, hang, traceback -> how often.
        failures: what happened, and the seed that brings it back.
        peak_bytes: the most memory that a child had resident.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    peak_bytes: int = 0

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(self.outcomes.items()))
        return f"{self.outcomes.total()} inputs: {counts}; {self.peak_bytes / 1e6:.0f} MB at most"


def run_attack(
    module: str,
    kind: str,
    count: int,
    *,
    seconds: float = 30.0,
    memory_bytes: int = 2_000_000_000,
    environment: dict[str, str] | None = None,
) -> Tally:
    """Try the seeds of a kind and so many inputs more.

    Args:
        module: where its `ATTACKS` has the kind.
        kind: the attack's name.
        count: inputs besides the seeds.
        seconds: after which an input counts as a hang.
        memory_bytes: what a child may take beyond what its imports took.
        environment: variables for the child.
    """
    tally, at = Tally(), 0
    total = len(seeds_of(kind)) + count
    while at < total:
        command = [sys.executable, "-m", "tests.faults.attack", module, kind]
        child = subprocess.Popen(
            [*command, str(at), str(total), str(memory_bytes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": str(_ROOT), **(environment or {})},
        )
        at = _follow(child, tally, seconds, at, module, kind)
    return tally


def _follow(
    child: subprocess.Popen[str], tally: Tally, seconds: float, at: int, module: str, kind: str
) -> int:
    """Hear a child until it ends, is silent or dies; return the number of the next input."""
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=_pump, args=(child.stdout, lines.put), daemon=True),
        threading.Thread(target=_pump, args=(child.stderr, errors.append), daemon=True),
    ]
    for reader in readers:
        reader.start()
    wait_s = _START_S
    ended = "abort"
    while True:
        try:
            line = lines.get(timeout=wait_s)
        except queue.Empty:
            ended = "hang"
            break
        if line is None:
            break
        wait_s = seconds
        word, _, rest = line.strip().partition(" ")
        if word == "done":
            tally.peak_bytes = max(tally.peak_bytes, int(rest))
            child.wait()
            return at
        if word == "at":
            at = int(rest)
            continue
        tally.outcomes[word] += 1
        if word == "traceback":
            tally.failures.append(f"{kind} {at}: {rest}; {_keep(module, kind, at)}")
        at += 1
    child.kill()
    code = child.wait()
    for reader in readers:
        reader.join(5)
    tally.outcomes[ended] += 1
    told = " ".join(line for line in errors if line)[-500:]
    tally.failures.append(f"{kind} {at}: {ended} ({code}) {told}; {_keep(module, kind, at)}")
    return at + 1


def _pump(stream: object, put: Callable[[str | None], None]) -> None:
    for line in stream:  # type: ignore[attr-defined]
        put(line)
    put(None)


def seeds_of(kind: str) -> list[Path]:
    """Return the inputs that once failed."""
    return sorted(SEEDS.glob(f"{kind}-*"))


def _input(attack: Attack, kind: str, number: int) -> bytes:
    seeds = seeds_of(kind)
    return seeds[number].read_bytes() if number < len(seeds) else attack.make(number - len(seeds))


def _keep(module: str, kind: str, number: int) -> str:
    if number < len(seeds_of(kind)):
        return f"seed {seeds_of(kind)[number].name}"
    attack = importlib.import_module(module).ATTACKS[kind]
    made = number - len(seeds_of(kind))
    data = attack.make(made)
    if len(data) > _LARGEST_SEED_BYTES:
        return f"made from {made}, too large to keep"
    # Kept beside the others only by hand: a seed that appears in the midst would shift the numbers.
    kept = Path(os.environ.get("FOVEATE_NEW_SEEDS", "build/fault-seeds")) / f"{kind}-{made}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(data)
    return f"kept as {kept}; move it to {SEEDS} when it is mended"


def _be_attacked(module: str, kind: str, start: int, end: int, memory_bytes: int) -> None:
    attack: Attack = importlib.import_module(module).ATTACKS[kind]
    say = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(start, end):
        data = _input(attack, kind, number)
        print(f"at {number}", file=say)
        try:
            attack.probe(data)
        except FoveateError:
            print("refused", file=say)
        except BaseException as error:
            print(f"traceback {error!r:.300}".replace("\n", " "), file=say)
        else:
            print("taken", file=say)
    print(f"done {_peak_bytes()}", file=say)
    say.flush()
    os._exit(0)  # threads of decoders that hang must not keep it


def _peak_bytes() -> int:
    """Return the most memory that was resident; `ru_maxrss` would count the parent's too."""
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024


if __name__ == "__main__":
    _be_attacked(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
