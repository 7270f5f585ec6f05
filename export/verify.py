"""`python -m export.verify`: does a bundle still say what its checkpoint says?

Enters: a bundle, the checkpoint it was built from, and pictures. Leaves: per picture, how far the
bundle's visual tokens, kept patches, first-token logits and greedy answer are from what PyTorch
makes of the same `pixel_values`; and a verdict against tolerances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from calibration.agreement import measure_cosine
from engines import cli
from engines.bundle import Bundle, open_bundle
from engines.errors import OptionError
from export.checkpoint import Checkpoint, open_checkpoint
from export.reducers import make_reducer
from export.reference import LanguageReference, VisionReference
from export.tolerances import tolerances_for
from export.verify_report import (
    AnswerAgreement,
    VerifyReport,
    compare_visual_tokens,
    json_from_report,
    summarize,
    table_from_report,
)
from runtime.backends.opening import open_backend
from runtime.generate import Generation, GenerationOptions
from runtime.pictures import load_picture
from runtime.preprocess import preprocess_batch
from runtime.prompt import PromptWriter, Turn
from runtime.vision import VisionEncoder, VisualTokens

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2"}
_EXAMPLES = (
    "`python -m export.verify build/pocket --images pictures/`",
    "`python -m export.verify B --model DIR --images pictures/ --vision-only --json`",
    "`python -m export.verify B --model DIR --images pictures/ --min-overlap 0.95`",
)

Compare = Callable[[VisualTokens, VisualTokens], AnswerAgreement]
"""From PyTorch's visual tokens and the bundle's to what both language models answer."""


@dataclass(frozen=True)
class VerifyOptions:
    """What to compare, and how.

    Attributes:
        bundle: the bundle's directory.
        images: a directory of pictures, or one picture.
        model: the checkpoint it was built from, a directory or a Hugging Face name; None looks for
            the name the bundle records, here and in ``models/``.
        tokens: which of the bundle's graphs, by its number of visual tokens; None is the first.
        question: what is asked about each picture.
        max_tokens: longest answer.
        vision_only: leave the language model out, with its memory and time.
        max_images: most pictures, in the order of their names; None takes all.
        backend: of the bundle's language model; None is its first.
        threads: CPU threads of the bundle's side.
        tolerances: fields of `Tolerances` that replace those of the bundle's precision.
    """

    bundle: Path
    images: Path
    model: str | None = None
    tokens: int | None = None
    question: str = "What is in the picture?"
    max_tokens: int = 32
    vision_only: bool = False
    max_images: int | None = None
    backend: str | None = None
    threads: int | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)


def verify_bundle(
    options: VerifyOptions,
    progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> VerifyReport:
    """Compare a bundle with its checkpoint.

    Args:
        options: what to compare.
        progress: wraps the pictures as they are gone through.

    Raises:
        FoveateError: the bundle, the checkpoint or a picture cannot be used, or the bundle was not
            built from a checkpoint of that shape.
    """
    files = find_pictures(options.images)[: options.max_images]
    bundle = open_bundle(options.bundle)
    graph = bundle.vision(options.tokens)
    precision = {"vision": str(graph.precision)}
    if not options.vision_only:
        precision["llm"] = bundle.language_model(options.backend).precision
    tolerances = tolerances_for(graph.precision, precision.get("llm"))
    tolerances = replace(tolerances, **options.tolerances)
    checkpoint = open_checkpoint(options.model or find_checkpoint(bundle.manifest.model))
    refuse_other_checkpoint(bundle, checkpoint)
    spec = graph.reducer
    reference = VisionReference(checkpoint, make_reducer(spec.name, **spec.options))

    pictures = []
    with ExitStack() as stack:
        encoder = stack.enter_context(
            VisionEncoder(bundle, threads=options.threads, tokens=options.tokens)
        )
        compare_answers: Compare | None = None
        if not options.vision_only:
            compare_answers = stack.enter_context(_language_models(bundle, checkpoint, options))
        for file in progress(files):
            picture = [load_picture(file)]
            ours = encoder.encode(picture)
            theirs = reference.encode(preprocess_batch(picture, bundle.preprocessing))
            answer = compare_answers(theirs, ours) if compare_answers else None
            pictures.append(compare_visual_tokens(file.name, theirs, ours, answer))
    summary = summarize(pictures)
    return VerifyReport(
        bundle=str(options.bundle),
        model=checkpoint.name,
        reducer={"name": spec.name, "tokens": spec.tokens, **spec.options},
        precision=precision,
        pictures=tuple(pictures),
        summary=summary,
        tolerances=tolerances,
        failures=tuple(tolerances.failures(summary)),
    )


def find_pictures(images: Path) -> list[Path]:
    """Return a directory's pictures by name, or the one picture.

    Raises:
        OptionError: there is none.
    """
    if images.is_file():
        return [images]
    if not images.is_dir():
        raise OptionError(f"--images {images} does not exist, expected a directory of pictures.")
    found = sorted(file for file in images.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not found:
        raise OptionError(
            f"--images {images} holds no picture, expected files ending in "
            f"{', '.join(sorted(_SUFFIXES))}."
        )
    return found


def find_checkpoint(name: str) -> str:
    """Return where the checkpoint lies whose name a bundle records.

    Raises:
        OptionError: neither here nor in ``models/``, and not the name of a repository.
    """
    for folder in (Path(name), Path("models", name)):
        if folder.is_dir():
            return str(folder)
    if "/" in name:
        return name
    raise OptionError(
        f"The bundle was built from {name}, which is neither here nor in models/. Give the "
        "checkpoint's directory with --model."
    )


def refuse_other_checkpoint(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Check that a bundle can have been built from a checkpoint.

    Raises:
        OptionError: a size differs; all that do are named.
    """
    manifest = bundle.manifest
    vision: Any = checkpoint.vision_config
    text: Any = checkpoint.text_config
    side = vision.image_size // vision.patch_size
    graph = manifest.vision[0]
    sizes = [
        ("patches", graph.patch_rows * graph.patch_columns, side * side),
        ("hidden_size of the language model", manifest.text.hidden_size, text.hidden_size),
    ]
    problems = [f"{what} {has} and {wants}" for what, has, wants in sizes if has != wants]
    if problems:
        raise OptionError(
            f"{bundle.root} was not built from {checkpoint.name}: {'; '.join(problems)}. It was "
            f"built from {manifest.model}; give that with --model."
        )


@contextmanager
def _language_models(
    bundle: Bundle, checkpoint: Checkpoint, options: VerifyOptions
) -> Iterator[Compare]:
    """Open both language models, and yield what asks them the same about one picture."""
    prompt = PromptWriter(bundle)
    turns = [Turn("user", options.question, images=1)]
    generation_options = GenerationOptions(max_tokens=options.max_tokens)
    backend = open_backend(bundle, options.backend, threads=options.threads)
    reference = LanguageReference(checkpoint)

    def compare(theirs: VisualTokens, ours: VisualTokens) -> AnswerAgreement:
        logits, ids = reference.answer(
            prompt.parts(turns, [theirs.picture(0)]), options.max_tokens, prompt.stop_token_ids
        )
        backend.rewind(0)
        our_logits = backend.prefill(prompt.parts(turns, [ours.picture(0)]))
        cosine = float(measure_cosine(logits[: len(our_logits)], our_logits))
        generation = Generation(
            backend,
            our_logits,
            prompt.tokenizer,
            stop_token_ids=prompt.stop_token_ids,
            options=generation_options,
        )
        for _ in generation:
            pass
        return AnswerAgreement(
            logits_cosine=cosine,
            equal=generation.token_ids == ids,
            reference=prompt.tokenizer.decode(ids),
            bundle=generation.text,
        )

    try:
        yield compare
    finally:
        backend.close()


def main(
    bundle: Annotated[Path, typer.Argument(help="The bundle's directory.")],
    images: Annotated[Path, typer.Option(help="Directory of pictures, or one picture.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint it was built from, a directory or a Hugging Face name; left out, "
            "the one the bundle names, here or in `models/`."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Which vision graph; left out, the first.")
    ] = None,
    question: Annotated[
        str, typer.Option(help="What is asked about each picture.")
    ] = VerifyOptions.question,
    max_tokens: cli.MaxTokensOption = VerifyOptions.max_tokens,
    vision_only: Annotated[
        bool, typer.Option("--vision-only", help="Leave the language model out.")
    ] = False,
    max_images: Annotated[int | None, typer.Option(min=1, help="Most pictures to compare.")] = None,
    backend: cli.BackendOption = None,
    threads: cli.ThreadsOption = None,
    max_relative: Annotated[
        float | None, typer.Option(help="Largest difference of a visual token, relative.")
    ] = None,
    min_overlap: Annotated[
        float | None, typer.Option(help="Least overlap (IoU) of the kept patches.")
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="Least cosine of a visual token.")
    ] = None,
    min_logits_cosine: Annotated[
        float | None, typer.Option(help="Least cosine of the first token's logits.")
    ] = None,
    min_equal_answers: Annotated[
        float | None, typer.Option(help="Least share of equal greedy answers.")
    ] = None,
    as_json: cli.JsonOption = False,
) -> int:
    """Compare a bundle with the checkpoint it was built from, on pictures of yours.

    PyTorch runs the checkpoint as transformers does, with every attention matrix; both sides get
    the same pixels. Tolerances left out are those of the bundle's precision. Exit code 1: a
    measure is past its tolerance.
    """
    tolerances = {
        "relative": max_relative,
        "overlap": min_overlap,
        "cosine": min_cosine,
        "logits_cosine": min_logits_cosine,
        "equal_answers": min_equal_answers,
    }
    options = VerifyOptions(
        bundle=bundle,
        model=model,
        images=images,
        tokens=tokens,
        question=question,
        max_tokens=max_tokens,
        vision_only=vision_only,
        max_images=max_images,
        backend=backend,
        threads=threads,
        tolerances={name: value for name, value in tolerances.items() if value is not None},
    )
    report = verify_bundle(
        options,
        lambda files: track(files, "Comparing pictures", console=Console(stderr=True)),
    )
    if as_json:
        cli.print_json(json_from_report(report))
    else:
        _print_report(report)
    return 0 if report.passed else 1


def _print_report(report: VerifyReport) -> None:
    Console().print(table_from_report(report))
    for picture in report.pictures:
        if picture.answer is not None and not picture.answer.equal:
            print(f"{picture.file}: PyTorch answers {picture.answer.reference!r}")
            print(f"{picture.file}: the bundle says {picture.answer.bundle!r}")
    if report.passed:
        print(f"{report.bundle} agrees with {report.model} within tolerance.")
    else:
        print(f"{report.bundle} differs from {report.model}: {'; '.join(report.failures)}.")


if __name__ == "__main__":
    cli.run(main, _EXAMPLES)
