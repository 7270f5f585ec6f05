"""Ask a bundle a question about a picture or a clip: `python -m runtime.ask`."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines import __version__
from engines.cli import JsonOption, print_json
from engines.llm_words import SERVERS
from engines.memory.context_length import ContextNeed
from runtime.clips.clip_options import ClipOptions, is_clip
from runtime.language.generate import GenerationOptions
from runtime.model_options import ModelOptions, SystemOption

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from runtime.frames import Frame
    from runtime.model import Answer, Model, Show
    from runtime.vision.graph_pool import GraphPool

EXAMPLES = (
    '`python -m runtime.ask build/pocket photo.jpg "What is in the picture?"`',
    '`python -m runtime.ask build/pocket photo.jpg "Is the door open?" --choices yes,no --json`',
    '`python -m runtime.ask build/pocket photo.jpg "Where is the cup?" --overlay kept.png`',
    '`python -m runtime.ask build/pocket clip.mp4 "What happened?" --clip-tokens 256`',
)


def ask(
    bundle: str | Path,
    image: str | Path,
    question: str,
    *,
    model: ModelOptions = ModelOptions(),
    system: str | None = None,
    overlay: Path | None = None,
    generation: GenerationOptions = GenerationOptions(),
    clip: ClipOptions = ClipOptions(),
    show: Show | None = None,
) -> Answer:
    """Open a bundle and answer one question; for more than one, keep what `open_model` returns.

    Args:
        bundle: the bundle's directory.
        image: a picture file; or a clip: a video, a bag, a folder of pictures.
        question: what to ask.
        model: how the bundle is loaded.
        system: instructions before the question.
        overlay: where to draw what was kept of the picture; of a clip, of the last frame told of.
        generation: how the answer is written.
        clip: how much of a clip is looked at.
        show: called with each piece of the answer as it is written.

    Returns:
        The answer, whose `milliseconds` also has the stage `load` (of the pictures and the bundle).
        About a clip it is a `ClipAnswer`.

    Raises:
        FoveateError: anything the user can fix.
    """
    from engines.bundle import open_bundle
    from runtime.clips.clip import ask_about_clip, frames_to_look_at, read_clip, refuse_clip
    from runtime.vision.pictures import load_picture

    started = time.perf_counter()
    frames: list[Frame] = []
    # Before the bundle is hashed: a wrong path is told at once.
    if is_clip(image):
        most = frames_to_look_at(open_bundle(bundle, verify=False), clip)
        frames = read_clip(str(image), clip, most)
    picture = frames[-1].image if frames else load_picture(image)
    chosen = model.open_bundle(bundle)
    if frames:
        refuse_clip(chosen)
    need = _context_need(chosen, len(frames), model, clip)
    need = replace(need, answer_tokens=generation.max_tokens, exchanges=1)
    with model.open(chosen, need=need.with_text(question, system)) as opened:
        load_ms = (time.perf_counter() - started) * 1e3
        if not frames:
            answer = opened.ask(picture, question, generation, system=system, show=show)
        else:
            with _graphs_of(opened, model) as graphs:
                answer = ask_about_clip(
                    opened,
                    frames,
                    question,
                    graphs,
                    total=clip.clip_tokens,
                    generation=generation,
                    system=system,
                    show=show,
                )
            picture = frames[answer.last_told].image
    if overlay is not None:
        from runtime.vision.overlay import save_overlay

        save_overlay(overlay, picture, answer.seen[-1], chosen)
    spent = {"load": load_ms, **answer.milliseconds}
    spent["total"] += load_ms
    return replace(answer, milliseconds=spent)


def _context_need(
    bundle: Bundle, frames: int, model: ModelOptions, clip: ClipOptions
) -> ContextNeed:
    """Return what the KV cache has to hold for a clip of that many frames; 0: for a picture."""
    from runtime.clips.clip import context_need

    if not frames:
        return ContextNeed()
    return context_need(bundle, bundle.vision(model.visual_tokens), frames, clip)


def _graphs_of(model: Model, options: ModelOptions) -> GraphPool:
    from runtime.vision.graph_pool import GraphPool

    return GraphPool(
        model.bundle,
        engine=options.engine,
        threads=options.threads,
        only=options.visual_tokens,
        opened=model.encoder,
    )


def document_from_answer(answer: Answer, bundle: Bundle) -> dict[str, Any]:
    """Return an answer as the JSON object that `--json` prints."""
    from runtime.clips.clip import ClipAnswer

    served = answer.backend in SERVERS
    graph = bundle.vision(answer.seen[0].budget)
    decode_seconds = answer.milliseconds["decode"] / 1e3
    document = {
        "answer": answer.text,
        "finish": answer.finish,
        "visual_tokens": answer.visual_tokens,
        "patches": answer.seen[0].assignment.shape[1],
        "prompt_tokens": answer.prompt_tokens,
        "reused_tokens": answer.reused_tokens,
        "answer_tokens": len(answer.token_ids),
        "answer_tokens_per_second": round(len(answer.token_ids) / decode_seconds, 2),
        "milliseconds": {stage: round(ms, 3) for stage, ms in answer.milliseconds.items()},
        "model": bundle.manifest.model,
        "reducer": graph.reducer.name,
        "vision_precision": graph.precision,
        "backend": answer.backend,
        "llm_precision": None if served else bundle.language_model(answer.backend).precision,
        "versions": installed_versions(),
    }
    if isinstance(answer, ClipAnswer):
        start_ns = answer.frames[0].timestamp_ns
        document["clip"] = [
            {
                "seconds": round((frame.timestamp_ns - start_ns) / 1e9, 3),
                "newness": round(frame.newness, 4),
                "visual_tokens": frame.visual_tokens,
            }
            for frame in answer.frames
        ]
    return document


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
    image: Annotated[
        Path,
        typer.Argument(help="Picture (JPEG, PNG, WebP, ...); or a clip: a video, a bag, a folder."),
    ],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    *,
    json_output: JsonOption = False,
    overlay: Annotated[
        Path | None,
        typer.Option(help="Draw the kept, merged and target patches into this picture file."),
    ] = None,
    system: SystemOption = None,
    model: ModelOptions,
    generation: GenerationOptions,
    clip: ClipOptions,
) -> int:
    """Ask a bundle a question about a picture, or about a clip.

    The answer is written to stdout as it comes; times go to stderr.

    Of a clip, frames spread over its length are compared, and each is told of with as many visual
    tokens as what is new in it deserves: a still camera costs one frame. The prompt then holds
    several pictures. A checkpoint trained on single pictures (the bundled pocket-llava is one)
    answers such prompts, but its answers about what happened mean little.
    """
    answer = ask(
        bundle,
        image,
        question,
        model=model,
        system=system,
        overlay=overlay,
        generation=generation,
        clip=clip,
        show=None if json_output else _write,
    )
    if json_output:
        from engines.bundle import open_bundle

        print_json(document_from_answer(answer, open_bundle(bundle, verify=False)))
    else:
        _tell(answer)
    return _exit_code(answer, generation)


def _tell(answer: Answer) -> None:
    """Print what an answer cost, below the answer."""
    print()
    stages = "  ".join(f"{stage} {ms:.0f} ms" for stage, ms in answer.milliseconds.items())
    print(f"{answer.visual_tokens} visual tokens  {stages}", file=sys.stderr)


def _exit_code(answer: Answer, generation: GenerationOptions) -> int:
    """Return 0; or 1, and say why, when an answer may not have the form it must have."""
    from runtime.language.answer_form import problem_with_form

    if generation.grammar is None or answer.finish == "complete":
        return 0
    problem = problem_with_form(answer.text, generation.grammar) or "it may be cut short"
    print(
        f"The answer ended with {answer.finish} and is not of the form asked for: {problem}. Ask "
        "again, in other words, or with a larger --max-tokens.",
        file=sys.stderr,
    )
    return 1


def _write(piece: str) -> None:
    print(piece, end="", flush=True)
