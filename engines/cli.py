"""The options that commands share, and how a command ends.

A command is a function of typed options. It prints results on stdout and everything else on stderr.
It ends with 0, with 1 when a check failed (it returns 1), or with 2 when the user can fix the
problem: a `FoveateError` becomes one paragraph on stderr. Any other exception is a defect: one
paragraph, a file with the traceback for a report, and exit code 70. A group of options is the
dataclass that the API takes, which a command takes as one parameter (`engines.option_groups`).
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from engines.errors import FoveateError, OptionError
from engines.last_resort import tell_of_defect, tell_of_threads
from engines.llm_words import KvCache, Positions, VisualWeights
from engines.option_groups import spread

_NOT_UTF_8 = re.compile("[\ud800-\udfff]")  # where Python put the bytes of the command line

Main = Callable[..., int | None]
"""A command: its parameters are the options, its docstring the help; it returns the exit code."""

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
        help="ort, llamacpp or openvino; vllm or trtllm (a server, with --llm-url) where text will "
        "do; left out, the bundle's first.",
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
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        "--context-length",
        min=1,
        help="Positions the KV cache holds; left out, room for the prompt, the visual tokens "
        "of the largest budget and the answer.",
    ),
]
KvCacheOption = Annotated[
    KvCache,
    typer.Option(
        "--kv-cache",
        help="Numbers of the KV cache: q8 takes 53 % of f16's memory, with llama.cpp only.",
    ),
]
PositionsOption = Annotated[
    Positions,
    typer.Option(
        "--positions",
        help="Where visual tokens stand for the language model: compact, one after the other; or "
        "original, each where it would if no token had been dropped, and the words behind all of "
        "them. With ort and openvino only.",
    ),
]
VisualWeightsOption = Annotated[
    VisualWeights,
    typer.Option(
        "--visual-weights",
        help="How much a visual token counts in attention: equal, as one; or patches, as many as "
        "were merged in it. With ort on a CPU and openvino only.",
    ),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify/--trust",
        help="Check every file's SHA-256 (about a second per GB), or only names and sizes.",
    ),
]


def run(main: Main, examples: Sequence[str] = ()) -> None:
    """Run ``main`` as this process's command and exit."""
    run_app(lambda: make_app(main, examples))


def run_app(make: Callable[[], typer.Typer], name: str | None = None) -> None:
    """Run what ``make`` returns as this process's command, called ``name``, and exit."""
    tell_of_threads()
    try:
        make()(prog_name=name)
    except FoveateError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:  # before or after main: while options are read, or help is shown
        sys.exit(tell_of_defect(error))


def make_app(main: Main, examples: Sequence[str] = ()) -> typer.Typer:
    """Return ``main`` as a command that ends well.

    Args:
        main: the command. A parameter that is a dataclass stands for the options that are its
            fields, and its default for theirs; `--help` shows them together under the beginning of
            the dataclass's docstring.
        examples: command lines shown under ``--help``.
    """
    app = empty_app()
    add_command(app, main, examples)
    return app


def empty_app(
    title: str | None = None, examples: Sequence[str] = (), *, add_completion: bool = False
) -> typer.Typer:
    """Return a command that has no sub-command yet."""
    return typer.Typer(
        help=title,
        epilog=_epilog(examples),
        add_completion=add_completion,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )


def add_command(
    app: typer.Typer, main: Main, examples: Sequence[str] = (), name: str | None = None
) -> None:
    """Make ``main`` a command of ``app``, as `make_app` does."""
    app.command(name, epilog=_epilog(examples))(_ending_well(spread(main)))


def _epilog(examples: Sequence[str]) -> str | None:
    return "\n\n".join(["Examples:", *examples]) if examples else None


def _ending_well(main: Main) -> Callable[..., None]:
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


def print_json(document: dict[str, Any]) -> None:
    """Print the one JSON object of a ``--json`` command."""
    print(json.dumps(document, ensure_ascii=False))
