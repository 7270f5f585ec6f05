"""The options that commands share, and how a command ends.

A command is a function of typed options. It prints results on stdout and everything else on stderr.
It ends with 0, with 1 when a check failed (it returns 1), or with 2 when the user can fix the
problem: a `FoveateError` becomes one paragraph on stderr. Any other exception is a defect: one
paragraph, a file with the traceback for a report, and exit code 70. Options that several commands
share are the fields of a dataclass, which a command takes as one parameter.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import operator
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from engines.errors import FoveateError, OptionError
from engines.last_resort import tell_of_defect, tell_of_threads

_NOT_UTF_8 = re.compile("[\ud800-\udfff]")  # where Python put the bytes of the command line

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, for machines.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads; left out, one per physical core."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="ort or llamacpp; vllm where a server will do; left out, the bundle's first.",
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="What runs the vision graph: ort, ort-cuda, ort-tensorrt, openvino, openvino-bf16, "
        "tensorrt or tensorrt-rtx; left out, what the bundle's target says.",
    ),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify/--trust",
        help="Check every file's SHA-256 (about a second per GB), or only names and sizes.",
    ),
]


def run(main: Callable[..., int | None], examples: Sequence[str] = ()) -> None:
    """Run ``main`` as this process's command and exit."""
    tell_of_threads()
    try:
        make_app(main, examples)()
    except Exception as error:  # before or after main: while options are read, or help is shown
        sys.exit(tell_of_defect(error))


def make_app(main: Callable[..., int | None], examples: Sequence[str] = ()) -> typer.Typer:
    """Return ``main`` as a command that ends well.

    Args:
        main: its parameters are the options, its docstring the help; it returns the exit code. A
            parameter that is a dataclass stands for the options that are its fields, and its
            default for theirs; `--help` shows them together under the beginning of
            the dataclass's docstring.
        examples: command lines shown under ``--help``.
    """
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )
    epilog = "\n\n".join(["Examples:", *examples]) if examples else None
    app.command(epilog=epilog)(_ending_well(_spread(main)))
    return app


def _spread(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Return ``main`` with the fields of a dataclass in the place of a parameter that is one."""
    kinds = get_type_hints(main, include_extras=True)
    groups: dict[str, Any] = {}
    parameters = []
    for parameter in inspect.signature(main).parameters.values():
        kind = kinds[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append((parameter.name, kind, parameter.default))
            continue
        groups[parameter.name] = kind
        for name, field_kind in get_type_hints(kind, include_extras=True).items():
            defaults = kind if parameter.default is inspect.Parameter.empty else parameter.default
            default = getattr(defaults, name, inspect.Parameter.empty)
            parameters.append((name, _under_title(field_kind, kind), default))

    def gathered(**options: Any) -> int | None:
        for name, kind in groups.items():
            names = [field.name for field in dataclasses.fields(kind)]
            options[name] = kind(**{field: options.pop(field) for field in names})
        return main(**options)

    only = inspect.Parameter.KEYWORD_ONLY
    gathered.__doc__ = main.__doc__
    gathered.__annotations__ = {name: kind for name, kind, _ in parameters}
    gathered.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, only, default=default, annotation=kind)
            for name, kind, default in parameters
        ]
    )
    return gathered


def _under_title(kind: Any, group: Any) -> Any:
    """Return an option's type with the first line of its group's docstring as its help panel."""
    base, *notes = get_args(kind)
    (panel,) = re.findall("^[^.:;]*", group.__doc__ or "")
    titled = [copy.copy(note) for note in notes]
    for note in titled:
        if isinstance(note, OptionInfo) and note.rich_help_panel is None:
            note.rich_help_panel = panel
    return operator.getitem(Annotated, (base, *titled))


def _ending_well(main: Callable[..., int | None]) -> Callable[..., None]:
    @functools.wraps(main)
    def guarded(**options: Any) -> None:
        try:
            _refuse_undecodable(options)
            code = main(**options)
        except FoveateError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            code = 130
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # ways to end that typer knows
        except Exception as error:
            code = tell_of_defect(error)
        raise typer.Exit(code or 0)

    return guarded


def _refuse_undecodable(options: dict[str, Any]) -> None:
    """Refuse text that is not UTF-8; the names of files may be anything.

    Raises:
        OptionError: an option, or one of its values, is not.
    """
    for name, value in options.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and _NOT_UTF_8.search(text):
                raise OptionError(
                    f"{name} is {text!r:.300}, which is not UTF-8. Type it in a terminal that is "
                    "set to UTF-8, or convert it with iconv."
                )


def one_of(option: str, value: str, choices: Any) -> Any:
    """Return ``value`` if a `Literal` type has it.

    Raises:
        OptionError: it has not; all that it has are named.
    """
    known = get_args(choices)
    if value not in known:
        raise OptionError(f"{option} {value}: expected one of {', '.join(known)}.")
    return value


def print_json(document: dict[str, Any]) -> None:
    """Print the one JSON object of a ``--json`` command."""
    print(json.dumps(document, ensure_ascii=False))
