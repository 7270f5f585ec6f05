"""How many questions a served bundle answers a second, by clients and visual tokens.

Each client asks over a connection of its own, again as soon as it has its answer, about the
held-out pictures of the bundled checkpoint. The server is another process on the same machine and
remembers no picture, so every question encodes one. Goal: with 64 tokens no fewer answers than with
all, at every number of clients, no error, and no growing memory.

    python -m benchmarks.serve_load build/pocket --seconds 60
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import typer

app = typer.Typer(add_completion=False)

TEST = Path(__file__).parents[1] / "models" / "pocket-llava" / "test"
_PATIENCE_S = 120.0
_WARM_UP_S = 3.0


@dataclass
class Run:
    """One number of clients with one budget.

    Attributes:
        clients: connections that ask at once.
        tokens: visual tokens of each picture.
        seconds: how long it took.
        milliseconds: of every answer.
        errors: what was no answer, by its words.
        start_mb: resident memory of the server before.
        end_mb: after.
        cpu_s: processor time that the server took; unlike the rest, other work on the machine
            changes it little.
    """

    clients: int
    tokens: int
    seconds: float = 0.0
    milliseconds: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    start_mb: float = 0.0
    end_mb: float = 0.0
    cpu_s: float = 0.0

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return len(self.milliseconds) / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Processor time of one answer."""
        return self.cpu_s * 1e3 / max(len(self.milliseconds), 1)

    def row(self) -> dict[str, Any]:
        """Return what the table shows."""
        fields = {name: value for name, value in asdict(self).items() if name != "milliseconds"}
        low, high = np.percentile(self.milliseconds or [np.nan], [50, 99]).tolist()
        return fields | {
            "answers": len(self.milliseconds),
            "per_second": round(self.per_second, 2),
            "cpu_ms": round(self.cpu_ms, 1),
            "p50_ms": round(low, 1),
            "p99_ms": round(high, 1),
        }


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(help="With graphs of several budgets.")],
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each run.")] = 60.0,
    clients: Annotated[str, typer.Option(help="Numbers of clients, with commas.")] = "1,8,32,64",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the server.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures encoded at once.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Ask a server of ``bundle`` at each number of clients and each budget in turn."""
    command = [sys.executable, "-m", "runtime.serve", str(bundle), "--port", "0", "--json"]
    command += ["--remember", "0"]
    for option, value in (("--threads", threads), ("--batch", batch)):
        command += [] if value is None else [option, str(value)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            told = json.loads(server.stdout.readline()) if server.stdout else {}
            budgets = sorted(told["visual_tokens"])
            runs = []
            for count in map(int, clients.split(",")):
                for tokens in budgets:
                    run = _measure(told["url"], told["model"], server.pid, count, tokens, seconds)
                    print(_line(run), file=sys.stderr, flush=True)
                    runs.append(run)
        finally:
            server.terminate()
    ratios = _ratios(runs)
    report = {
        "seconds": seconds,
        "threads": threads,
        "batch": batch,
        "runs": [run.row() for run in runs],
        "ratios": ratios,
    }
    print(json.dumps(report) if as_json else _table(runs, ratios))


def _measure(url: str, model: str, pid: int, count: int, tokens: int, seconds: float) -> Run:
    asks = _requests(url, model, tokens)
    asyncio.run(_ask_all(url, asks, Run(count, tokens), min(_WARM_UP_S, seconds)))
    run = Run(count, tokens, start_mb=_resident_mb(pid))
    before_s = _processor_s(pid)
    asyncio.run(_ask_all(url, asks, run, seconds))
    run.cpu_s = _processor_s(pid) - before_s
    run.end_mb = _resident_mb(pid)
    return run


def _requests(url: str, model: str, tokens: int) -> list[bytes]:
    """Return a request for each held-out question, ready to be sent."""
    lines = (TEST / "questions.jsonl").read_text("utf-8").splitlines()
    pictures: dict[str, str] = {}
    asks = []
    for fields in map(json.loads, lines):
        name = fields["image"]
        if name not in pictures:
            pictures[name] = base64.b64encode((TEST / name).read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pictures[name]}"}},
            {"type": "text", "text": fields["question"]},
        ]
        body = json.dumps(
            {
                "model": model,
                "visual_tokens": tokens,
                "messages": [{"role": "user", "content": content}],
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        asks.append(head.encode() + body)
    # Neighbours ask about one picture: apart, each question meets a picture that is new.
    return [asks[at * 997 % len(asks)] for at in range(len(asks))]


async def _ask_all(url: str, asks: list[bytes], run: Run, seconds: float) -> None:
    started = time.monotonic()
    places = iter(range(sys.maxsize))
    workers = [_ask(url, asks, places, run, started + seconds) for _ in range(run.clients)]
    await asyncio.gather(*workers)
    run.seconds = time.monotonic() - started


async def _ask(url: str, asks: list[bytes], places: Any, run: Run, until: float) -> None:
    """Ask until the time is over, over one connection while it lasts."""
    address = urlsplit(url)
    streams = None
    while time.monotonic() < until:
        started = time.perf_counter()
        try:
            streams = streams or await asyncio.open_connection(address.hostname, address.port)
            status = await asyncio.wait_for(
                _exchange(*streams, asks[next(places) % len(asks)]), _PATIENCE_S
            )
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            status, streams = type(error).__name__, None
        if status == "200":
            run.milliseconds.append((time.perf_counter() - started) * 1e3)
        else:
            run.errors[status] = run.errors.get(status, 0) + 1
    if streams is not None:
        streams[1].close()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ask: bytes) -> str:
    """Send one request, read its answer and return the status."""
    writer.write(ask)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.split("content-length:")[1].split("\r\n")[0])
    await reader.readexactly(length)
    return head.split(" ", 2)[1]


def _resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1e3


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ratios(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Return how much more few tokens give than all, a second and for one second of processor."""
    most = max(run.tokens for run in runs)
    whole = {run.clients: run for run in runs if run.tokens == most}
    return {
        f"{run.tokens}/{most} at {run.clients}": {
            "per_second": round(run.per_second / whole[run.clients].per_second, 2),
            "per_cpu_second": round(whole[run.clients].cpu_ms / run.cpu_ms, 2),
        }
        for run in runs
        if run.tokens != most
    }


def _line(run: Run) -> str:
    row = run.row()
    return (
        f"{run.clients:3d} clients  {run.tokens:4d} tokens  {row['per_second']:7.2f} answers/s  "
        f"p50 {row['p50_ms']:8.1f} ms  p99 {row['p99_ms']:8.1f} ms  "
        f"CPU {run.cpu_ms:6.1f} ms  {run.errors or 'no'} errors  "
        f"{run.start_mb:.0f} -> {run.end_mb:.0f} MB"
    )


def _table(runs: list[Run], ratios: dict[str, dict[str, float]]) -> str:
    told = [
        f"{name}: {ratio['per_second']:.2f}, by processor time {ratio['per_cpu_second']:.2f}"
        for name, ratio in ratios.items()
    ]
    return "\n".join([*map(_line, runs), "answers a second against all tokens:", *told])


if __name__ == "__main__":
    app()
