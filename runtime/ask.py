"""Ask a bundle a question about a picture.

Enters: a bundle, a picture file and a question. Leaves: the answer, streamed as it is written, and
where the time went. `ask` is the function; `python -m runtime.ask` the command.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines import __version__
from engines.cli import JsonOption, print_json, run
from runtime.answer_options import AnswerOptions, SystemOption
from runtime.generate import GenerationOptions
from runtime.model_options import ModelOptions

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from runtime.model import Answer, Show

EXAMPLES = (
    '`python -m runtime.ask build/pocket photo.jpg "What is in the picture?"`',
    '`python -m runtime.ask build/pocket photo.jpg "Is the door open?" --choices yes,no --json`',
    '`python -m runtime.ask build/pocket photo.jpg "Where is the cup?" --overlay kept.png`',
)


@dataclass(frozen=True)
class AskOptions:
    """How to ask.

    Attributes:
        model: how the bundle is loaded.
        system: instructions before the question.
        overlay: where to draw what was kept of the picture.
        generation: how the answer is written.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    system: str | None = None
    overlay: Path | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)


def ask(
    bundle: str | Path,
    image: str | Path,
    question: str,
    options: AskOptions | None = None,
    show: Show | None = None,
) -> tuple[Answer, Bundle]:
    """Open a bundle and answer one question; for more than one, keep a `runtime.model.Model`.

    Args:
        bundle: the bundle's directory.
        image: a picture file.
        question: what to ask.
        options: how to ask.
        show: called with each piece of the answer as it is written.

    Returns:
        The answer, whose `milliseconds` also has the stage `load`, and the bundle that gave it.

    Raises:
        FoveateError: anything the user can mend.
    """
    from runtime.pictures import load_picture

    chosen = options or AskOptions()
    started = time.perf_counter()
    picture = load_picture(image)  # before the bundle: a wrong path is told at once
    with chosen.model.open(bundle) as model:
        load_ms = (time.perf_counter() - started) * 1e3
        answer = model.ask(picture, question, chosen.generation, system=chosen.system, show=show)
    if chosen.overlay is not None:
        from runtime.overlay import save_overlay

        save_overlay(chosen.overlay, picture, answer.seen[0], model.bundle)
    spent = {"load": load_ms, **answer.milliseconds}
    spent["total"] += load_ms
    return replace(answer, milliseconds=spent), model.bundle


def document_from_answer(answer: Answer, bundle: Bundle) -> dict[str, Any]:
    """Return an answer as the JSON object that `--json` prints."""
    here = {model.backend: model.precision for model in bundle.manifest.language_models}
    graph = bundle.vision(answer.seen[0].tokens.shape[1])
    decode_seconds = answer.milliseconds["decode"] / 1e3
    return {
        "answer": answer.text,
        "finish": answer.finish,
        "visual_tokens": answer.visual_tokens,
        "patches": graph.patch_rows * graph.patch_columns,
        "prompt_tokens": answer.prompt_tokens,
        "reused_tokens": answer.reused_tokens,
        "answer_tokens": len(answer.token_ids),
        "answer_tokens_per_second": round(len(answer.token_ids) / decode_seconds, 2),
        "milliseconds": {stage: round(ms, 3) for stage, ms in answer.milliseconds.items()},
        "model": bundle.manifest.model,
        "reducer": graph.reducer.name,
        "vision_precision": graph.precision,
        "backend": answer.backend,
        "llm_precision": here.get(answer.backend),
        "versions": installed_versions(),
    }


def installed_versions() -> dict[str, str]:
    """Return the versions of what ran."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"foveate": __version__, "python": platform.python_version()}
    for package in ("numpy", "onnxruntime", "tokenizers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # onnxruntime-gpu goes by its other name
            continue
    return versions


def main(
    bundle: Annotated[Path, typer.Argument(help="Directory that `export.build` wrote.")],
    image: Annotated[Path, typer.Argument(help="Picture file: JPEG, PNG, WebP, ...")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    *,
    json_output: JsonOption = False,
    overlay: Annotated[
        Path | None,
        typer.Option(help="Draw the kept, merged and target patches into this picture file."),
    ] = None,
    system: SystemOption = None,
    model: ModelOptions,
    answering: AnswerOptions,
) -> None:
    """Ask a bundle a question about a picture.

    The answer is written to stdout as it comes; times go to stderr.
    """
    options = AskOptions(model, system, overlay, answering.generation())
    show = None if json_output else _write
    answer, opened = ask(bundle, image, question, options, show)
    if json_output:
        print_json(document_from_answer(answer, opened))
        return
    print()
    stages = "  ".join(f"{stage} {ms:.0f} ms" for stage, ms in answer.milliseconds.items())
    print(f"{answer.visual_tokens} visual tokens  {stages}", file=sys.stderr)


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


if __name__ == "__main__":
    run(main, EXAMPLES)
