"""`foveate COMMAND`, or `python -m foveate COMMAND`: one door to the commands of every floor.

A command's module is imported when it is the one that was asked for, so that `--help` is quick and
a robot that has no PyTorch has every other command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

import typer

from engines import cli
from engines.errors import OptionError

WAY: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "1. Choose a device": {
        "targets": ("engines.targets", "List the devices a bundle can be built for."),
        "estimate": ("engines.estimate", "Estimate what a model costs on a device."),
    },
    "2. Build a bundle, where PyTorch is": {
        "tune": ("export.tune.command", "Tune a checkpoint to few visual tokens."),
        "build": ("export.build.command", "Build a bundle from a checkpoint."),
        "verify": ("export.verify.command", "Compare bundles with their checkpoint."),
    },
    "3. Make it fit the robot": {
        "calibrate": ("calibration.calibrate", "Make it INT8, on your own frames."),
        "engines": ("engines.build", "Build its TensorRT plans, on the device."),
        "doctor": ("engines.doctor", "Say what this machine lacks."),
        "inspect": ("engines.inspect", "Say what a bundle holds."),
    },
    "4. Ask": {
        "ask": ("runtime.commands.ask", "Ask about a picture or a clip."),
        "chat": ("runtime.commands.chat", "Talk about pictures."),
        "watch": ("runtime.commands.watch", "Watch cameras and answer again and again."),
        "label": ("runtime.commands.label", "Ask about recordings, into a Parquet file."),
    },
    "5. Serve": {
        "serve": ("runtime.commands.serve", "Serve it to every OpenAI client."),
        "triton": ("runtime.commands.triton", "Write a model repository for Triton."),
    },
}
"""Panel of `--help` -> command -> the module that holds it, and what it does."""

_HELP = """Vision-language models on robots, from a checkpoint to answers.

The commands stand in the order in which a robot gets to its answers.
"""
_EXAMPLES = (
    "`foveate build --model models/pocket-llava --out build/pocket`",
    '`foveate ask build/pocket photo.jpg "What is in the picture?"`',
)


def main() -> None:
    """Run the command that was asked for, and exit."""
    cli.run_app(lambda: make_app(_asked_for(sys.argv[1:], os.environ)), "foveate")


def make_app(wanted: str | None) -> typer.Typer:
    """Return the command with one sub-command that can be run, and the names of the others.

    Raises:
        OptionError: the sub-command needs packages that are not installed.
    """
    app = cli.empty_app(_HELP, _EXAMPLES, add_completion=True)
    for panel, commands in WAY.items():
        for name, (module, line) in commands.items():
            if name == wanted:
                command, examples = _load(name, module)
                cli.add_command(app, command, examples, name=name)
            else:
                app.command(name, help=line, rich_help_panel=panel)(_not_asked_for)
    return app


def _asked_for(arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Return the word behind `foveate`, of the line that a shell wants completed too."""
    if "_FOVEATE_COMPLETE" in environment:
        line = environment.get("COMP_WORDS") or environment.get("_TYPER_COMPLETE_ARGS", "")
        arguments = line.split()[1:]
    return next(iter(arguments), None)


def _load(name: str, module: str) -> tuple[cli.Main, Sequence[str]]:
    extra = module.split(".", maxsplit=1)[0]
    try:
        holder = import_module(module)
    except ModuleNotFoundError as absent:
        if extra not in ("calibration", "export"):
            raise
        raise OptionError(
            f"foveate {name} needs {absent.name}, which is not installed here. Run: "
            f"pip install 'foveate[{extra}]'"
        ) from absent
    return holder.main, holder.EXAMPLES


def _not_asked_for() -> None:
    """Stand for a command that `--help` names."""


if __name__ == "__main__":
    main()
