"""Hostile command lines, for `ask`, `chat` and `watch`: run in process, as typer would."""

from __future__ import annotations

import importlib
import json
import logging
import os
from pathlib import Path

from typer.testing import CliRunner

from engines.cli import make_app
from engines.errors import OptionError
from tests.faults.attack import Attack
from tests.faults.mutations import damaged, random_of

_PLAIN = (
    "What is it?",
    "",
    " ",
    "x" * 20_000,
    "\udcff\udcfe",
    "a\ud800b",
    "\u202e\u0000x",
    "é\n🙂",
)
_NUMBERS = (
    *("0", "1", "-1", "2", "1e-320", "1e308", "1e999", "nan", "inf", "-inf", "0x10", "", "1_000"),
    *("99999", "65536", "999999999999999999999", "9" * 5000, "1.5", "-0.0", "٣", "½", "NaN"),
)
_SPECS = (
    *("VIDEO", "PICTURE", "FOLDER", "raw:100000x100000", "raw:0x0", "raw:", "raw:4x4", "-", ""),
    *("~nosuchuser/x.mp4", "~", "/dev/zero", "/dev/null", "/dev", "x" * 5000, "nowhere.mp4"),
    *("\udcff.mp4", "gst:", "gst:'", "csi:?x=1", "csi:{id}", " ! ", "9" * 5000, "0?x=1", "?"),
    *("rtsp://", "http://[::1", "http://127.0.0.1:99999/x", "tcp://127.0.0.1:1", "file:VIDEO"),
    *("concat:VIDEO|VIDEO", "pipe:0", "data:,x", "http://127.0.0.1:1/?token=x", "BUNDLE"),
)
_TEXTS = ("", ",", "yes,no", "yes,yes", "a" * 3000, "\udcff", "0,0,1,1", "1,2,3", "-1,0,4,4", "{}")
_NUMBER_OPTIONS = {
    "ask": (
        *("--max-tokens", "--temperature", "--top-k", "--top-p", "--repetition-penalty", "--seed"),
        *("--threads", "--visual-tokens", "--context-length", "--llm-timeout", "--clip-frames"),
        "--clip-tokens",
    ),
    "watch": (
        *("--every", "--refresh", "--fps", "--rotate", "--answers", "--metrics-port", "--threads"),
        *("--max-tokens", "--temperature", "--latency-target", "--tokens-per-second", "--power"),
        *("--repetition-penalty", "--visual-tokens", "--context-length"),
    ),
    "chat": ("--max-tokens", "--temperature", "--top-p", "--repetition-penalty", "--seed"),
}
_TEXT_OPTIONS = {
    "ask": (
        *("--system", "--backend", "--engine", "--choices", "--json-schema", "--stop", "--topic"),
        *("--overlay", "--llm-url", "--llm-model"),
    ),
    "watch": ("--system", "--backend", "--engine", "--crop", "--topic", "--stop", "--choices"),
    "chat": ("--system", "--backend", "--engine", "--resume", "--choices", "--stop"),
}
_STDIN = (
    *(b"", b"stop\n", b"\xff\xfe\n", b"ask \xff?\nstop\n", b"ask " + b"x" * 200_000 + b"\nstop\n"),
    *(b"/image \xff\n", b"/image /dev/zero\n", b"/save /\n", b"/quit\n", b"/\n", b"What?\n"),
    *(b"ask\npause\nresume\nstop\n", b"\x00" * 300, b"/frame ~nosuchuser/x\n", b"/resume\n"),
)


def _command(number: int) -> bytes:
    rng = random_of("command", number)

    def one(values: tuple[str, ...]) -> str:
        return values[rng.integers(len(values))]

    name = one(("ask", "ask", "watch", "chat"))
    bundle = one((*["BUNDLE"] * 8, "nowhere", "FOLDER", "VIDEO", "/dev/zero", "x" * 5000))
    source = one((*["VIDEO", "PICTURE"] * 12, *_SPECS))
    if name == "ask":
        given = [bundle, source, one((*["What?"] * 6, *_PLAIN))]
    elif name == "watch":
        given = [bundle, source, "--ask", one((*["What?"] * 6, *_PLAIN)), "--every-frame"]
        given += ["--control"] * int(rng.integers(2)) + ["--status"] * int(rng.integers(2))
        given += ["--record", "RECORD"] * int(rng.integers(2)) + ["--answers", "2"]
    else:
        given = [bundle, source]
    given += ["--json"] * int(name != "watch" and rng.integers(2))
    given += ["--max-tokens", "2"] * int(rng.integers(8) > 0)
    for _ in range(rng.integers(0, 3)):
        given += [one(_NUMBER_OPTIONS[name]), one(_NUMBERS)]
    for _ in range(rng.integers(0, 2)):
        given += [one(_TEXT_OPTIONS[name]), one((*_TEXTS, *_SPECS[:8]))]
    typed = _STDIN[rng.integers(len(_STDIN))]
    typed = damaged(typed, rng) if typed and not rng.integers(3) else typed
    return json.dumps({"name": name, "given": given, "typed": typed.decode("latin-1")}).encode()


def _probe(data: bytes) -> None:
    """Run the command; it must end with 0, 1 or 2, say why, and print nothing that is not JSON."""
    line = json.loads(data)
    places = json.loads(os.environ["FOVEATE_FAULT_PLACES"])
    given = [_placed(argument, places) for argument in line["given"]]
    logging.getLogger().handlers.clear()  # of the command before, with a stderr that is closed
    main = importlib.import_module(f"runtime.{line['name']}").main
    done = CliRunner().invoke(make_app(main), given, input=line["typed"].encode("latin-1"))
    reports = [path.read_text() for path in Path(places["TEMP"]).glob("foveate-*.txt")]
    for path in Path(places["TEMP"]).glob("foveate-*.txt"):
        path.unlink()
    if reports or done.exit_code not in (0, 1, 2) or "Traceback" in done.stderr:
        raise RuntimeError(f"{done.exit_code}: {(reports or [done.stderr])[-1][-250:]}")
    if done.exit_code == 2 and not done.stderr.strip():
        raise RuntimeError(f"{given!r:.300} does not say why")
    if "--json" in given and done.exit_code == 2 and done.stdout.strip():
        raise RuntimeError(f"{given!r:.300} printed {done.stdout!r:.100}")
    if "--json" in given and done.exit_code == 0:
        json.loads(done.stdout)
    if done.exit_code == 2:
        raise OptionError(done.stderr)


def _placed(argument: str, places: dict[str, str]) -> str:
    for word, path in places.items():
        argument = argument.replace(word, path)
    return argument


ATTACKS = {"command": Attack(_command, _probe)}
