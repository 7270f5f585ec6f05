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
from engines.cli import (
    BackendOption,
    EngineOption,
    JsonOption,
    MaxTokensOption,
    SeedOption,
    ThreadsOption,
    VerifyOption,
    print_json,
    run,
)
from runtime.answer_options import (
    ChoicesOption,
    JsonSchemaOption,
    RepetitionPenaltyOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    VisualTokensOption,
    generation_from_options,
)
from runtime.generate import GenerationOptions
from runtime.sampling import Sampling

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
        backend: the language backend; None takes the bundle's first.
        engine: what runs the vision graph; None takes what the bundle's target says.
        threads: CPU threads; None takes one per physical core.
        visual_tokens: which of the bundle's vision graphs; None takes the first.
        system: instructions before the question.
        verify: check the hash of every file of the bundle.
        overlay: where to draw what was kept of the picture.
        generation: how the answer is written.
    """

    backend: str | None = None
    engine: str | None = None
    threads: int | None = None
    visual_tokens: int | None = None
    system: str | None = None
    verify: bool = True
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
    from engines.bundle import open_bundle
    from runtime.model import open_model
    from runtime.pictures import load_picture

    chosen = options or AskOptions()
    started = time.perf_counter()
    picture = load_picture(image)  # before the bundle: a wrong path is told at once
    opened = open_bundle(bundle, verify=chosen.verify)
    with open_model(
        opened,
        backend=chosen.backend,
        engine=chosen.engine,
        threads=chosen.threads,
        visual_tokens=chosen.visual_tokens,
    ) as model:
        load_ms = (time.perf_counter() - started) * 1e3
        answer = model.ask(picture, question, chosen.generation, system=chosen.system, show=show)
    if chosen.overlay is not None:
        from runtime.overlay import save_overlay

        save_overlay(chosen.overlay, picture, answer.seen[0], opened)
    spent = {"load": load_ms, **answer.milliseconds}
    spent["total"] += load_ms
    return replace(answer, milliseconds=spent), opened


def document_from_answer(answer: Answer, bundle: Bundle, backend: str | None) -> dict[str, Any]:
    """Return an answer as the JSON object that `--json` prints."""
    language = bundle.language_model(backend)
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
        "backend": language.backend,
        "llm_precision": language.precision,
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
    json_output: JsonOption = False,
    overlay: Annotated[
        Path | None,
        typer.Option(help="Draw the kept, merged and target patches into this picture file."),
    ] = None,
    visual_tokens: VisualTokensOption = None,
    system: SystemOption = None,
    backend: BackendOption = None,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
    max_tokens: MaxTokensOption = 256,
    choices: ChoicesOption = None,
    json_schema: JsonSchemaOption = None,
    stop: StopOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = 0,
    verify: VerifyOption = True,
) -> None:
    """Ask a bundle a question about a picture.

    The answer is written to stdout as it comes; times go to stderr.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    options = AskOptions(
        backend=backend,
        engine=engine,
        threads=threads,
        visual_tokens=visual_tokens,
        system=system,
        verify=verify,
        overlay=overlay,
        generation=generation_from_options(sampling, max_tokens, stop, choices, json_schema),
    )
    show = None if json_output else _write
    answer, opened = ask(bundle, image, question, options, show)
    if json_output:
        print_json(document_from_answer(answer, opened, backend))
        return
    print()
    stages = "  ".join(f"{stage} {ms:.0f} ms" for stage, ms in answer.milliseconds.items())
    print(f"{answer.visual_tokens} visual tokens  {stages}", file=sys.stderr)


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


if __name__ == "__main__":
    run(main, EXAMPLES)
