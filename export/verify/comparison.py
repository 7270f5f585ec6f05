"""Compare bundles with their checkpoint, picture by picture.

Every candidate and PyTorch get the same pixels. PyTorch computes a picture once for all candidates
with the same reducer. All pictures are seen first and asked about afterwards, so that one model
only is in memory: first the towers, then PyTorch's language model, then that of each bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Protocol

import typer

from calibration.agreement.stages import measure_stages
from calibration.agreement.token_metrics import compare_visual_tokens
from engines.bundle import Bundle, open_bundle
from engines.cli import BackendOption, MaxTokensOption, ThreadsOption
from engines.errors import OptionError
from engines.manifest import VisionGraph
from engines.option_groups import Given, Typed
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.release_memory import release_memory
from export.tracks import Track, silently
from export.verify.answers import (
    KeptTokens,
    Question,
    answer_with_torch,
    check_language_models,
    compare_answers,
)
from export.verify.candidates import Candidate, open_candidates
from export.verify.reference import Observation
from export.verify.report import (
    AnswerAgreement,
    CandidateReport,
    PictureAgreement,
    VerifyReport,
    find_first_divergence,
    find_largest_growth,
    list_failures,
    summarize,
    summarize_stages,
)
from export.verify.sides import (
    TorchVision,
    find_checkpoint,
    recipe_of,
    refuse_other_checkpoint,
)
from export.verify.tolerances import Tolerances, tolerances_for
from runtime.vision import VisualTokens
from runtime.vision.pictures import load_picture
from runtime.vision.preprocess import PixelValues

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2"}


class Watch(Protocol):
    """A callback that gets every compared picture; the page with overlays is made from it."""

    def __call__(
        self, file: Path, candidate: Candidate, theirs: VisualTokens, ours: VisualTokens
    ) -> None:
        """Look at one picture: PyTorch's visual tokens and the candidate's."""


@dataclass(frozen=True)
class VerifyOptions:
    """What to compare, and how.

    Attributes:
        bundles: their directories.
        images: a directory of pictures, or one picture.
        model: the checkpoint they were built from, a directory or a Hugging Face name; None looks
            for the name the bundles record, here and in ``models/``.
        engines: names of `engines.opening`, on each of which every bundle is compared; empty
            is ONNX Runtime and, where it is here, what a bundle's target names.
        tokens: which of a bundle's graphs, by its number of visual tokens; None is the first.
        question: what is asked about each picture.
        max_tokens: longest answer.
        vision_only: leave the language models out, with their memory and time.
        stages: compare the graphs stage by stage too, which runs each twice.
        max_images: most pictures, in the order of their names; None takes all.
        backend: of the bundles' language models; None is a bundle's first.
        threads: CPU threads of the bundles' side.
        tolerances: fields of `Tolerances` that replace those of a bundle's precision.
    """

    bundles: Annotated[
        tuple[Path, ...],
        typer.Argument(help="Directories of one or more bundles."),
        Typed(tuple, list, list[Path]),
    ]
    images: Annotated[Path, typer.Option(help="Directory of pictures, or one picture.")]
    model: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint they were built from, a directory or a Hugging Face name; left "
            "out, the one the bundles name, here or in `models/`."
        ),
    ] = None
    engines: Annotated[
        tuple[str, ...],
        typer.Option(
            "--engine",
            help="What runs the vision graphs: ort, ort-cuda, ort-tensorrt, openvino, "
            "openvino-bf16, tensorrt, tensorrt-rtx, or several with commas; left out, ort and, "
            "where it is here, what a bundle's target says.",
        ),
        Typed(
            lambda words: tuple(name.strip() for name in words.split(",")),
            lambda names: ",".join(names) or None,
            str | None,
        ),
    ] = ()
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Which vision graph; left out, the first.")
    ] = None
    question: Annotated[str, typer.Option(help="What is asked about each picture.")] = (
        "What is in the picture?"
    )
    max_tokens: MaxTokensOption = 32
    vision_only: Annotated[
        bool, typer.Option("--vision-only", help="Leave the language models out.")
    ] = False
    stages: Annotated[
        bool, typer.Option(help="Tell where in the graph the error comes in; runs it twice.")
    ] = True
    max_images: Annotated[int | None, typer.Option(min=1, help="Most pictures to compare.")] = None
    backend: BackendOption = None
    threads: ThreadsOption = None
    tolerances: Annotated[Mapping[str, float], Given(Tolerances)] = field(default_factory=dict)


def verify_bundles(
    options: VerifyOptions,
    show: Track = silently,
    *,
    note: Callable[[str], None] = lambda line: None,
    watch: Watch | None = None,
) -> VerifyReport:
    """Compare bundles with their checkpoint.

    Args:
        options: what to compare.
        show: shows how far it is.
        note: told what is left out, and why.
        watch: shown every picture.

    Raises:
        FoveateError: a bundle, the checkpoint, an engine or a picture cannot be used, or a bundle
            was not built from a checkpoint of that shape.
    """
    files = find_pictures(options.images)[: options.max_images]
    graphs = [(bundle, bundle.vision(options.tokens)) for bundle in _open_bundles(options)]
    tolerances = [_tolerances(bundle, graph, options) for bundle, graph in graphs]
    bundles = [bundle for bundle, _ in graphs]
    checkpoint = open_checkpoint(options.model or find_checkpoint(bundles))
    for bundle in bundles:
        refuse_other_checkpoint(bundle, checkpoint)
    question = Question(options.question, options.max_tokens, options.backend, options.threads)
    if not options.vision_only:
        check_language_models(bundles, question)
    with TemporaryDirectory(prefix="foveate-verify-") as folder:
        with ExitStack() as stack:
            candidates = open_candidates(
                stack,
                graphs,
                options.engines,
                threads=options.threads,
                with_stages=options.stages,
                note=note,
            )
            kept = None if options.vision_only else _Kept(Path(folder), candidates)
            rows = _see(files, checkpoint, candidates, kept, show, watch)
            providers = [candidate.encoder.session.provider for candidate in candidates]
        if kept is not None:
            release_memory()
            rows = _answer(rows, checkpoint, candidates, kept, question, show)
    limits = dict(zip((bundle.root for bundle in bundles), tolerances, strict=True))
    reports = tuple(
        _report(candidate, provider, row, limits[candidate.bundle.root], options)
        for candidate, provider, row in zip(candidates, providers, rows, strict=True)
    )
    asked = None if options.vision_only else options.question
    return VerifyReport(checkpoint.name, asked, reports)


class _Kept:
    """The visual tokens of every side, on the disk until the language models are asked.

    Attributes:
        ours: of each candidate, in their order.
        theirs: of PyTorch, by recipe.
    """

    def __init__(self, folder: Path, candidates: Sequence[Candidate]) -> None:
        self.ours = [KeptTokens(folder / f"candidate-{at}") for at in range(len(candidates))]
        recipes = dict.fromkeys(recipe_of(one.bundle, one.graph) for one in candidates)
        self.theirs = {
            recipe: KeptTokens(folder / f"pytorch-{at}") for at, recipe in enumerate(recipes)
        }


def _see(
    files: Sequence[Path],
    checkpoint: Checkpoint,
    candidates: Sequence[Candidate],
    kept: _Kept | None,
    show: Track,
    watch: Watch | None,
) -> list[list[PictureAgreement]]:
    """Compare the vision graphs with PyTorch, and keep the visual tokens of both.

    Returns:
        A row of pictures for each candidate; nobody has answered yet.
    """
    sides: dict[str, TorchVision] = {}
    for candidate in candidates:
        recipe = recipe_of(candidate.bundle, candidate.graph)
        if recipe not in sides:
            sides[recipe] = TorchVision(checkpoint, candidate.bundle, candidate.graph)
    rows: list[list[PictureAgreement]] = [[] for _ in candidates]
    for at in show(range(len(files)), "Comparing pictures"):
        picture = load_picture(files[at])
        seen = {recipe: side.look(picture) for recipe, side in sides.items()}
        for place, candidate in enumerate(candidates):
            pixels, theirs = seen[recipe_of(candidate.bundle, candidate.graph)]
            ours = candidate.encoder.encode([picture])
            if watch is not None:
                watch(files[at], candidate, theirs.tokens, ours)
            if kept is not None:
                kept.ours[place].add(ours)
            rows[place].append(_compare(files[at].name, candidate, pixels, theirs, ours))
        if kept is not None:
            for recipe, (_, theirs) in seen.items():
                kept.theirs[recipe].add(theirs.tokens)
    return rows


def _compare(
    file: str,
    candidate: Candidate,
    pixels: PixelValues,
    theirs: Observation,
    ours: VisualTokens,
) -> PictureAgreement:
    stages = candidate.stages.run(pixels) if candidate.stages is not None else {}
    return PictureAgreement(
        file=file,
        tokens=(int(theirs.tokens.valid[0]), int(ours.valid[0])),
        visual_tokens=compare_visual_tokens(theirs.tokens, ours),
        stages=tuple(measure_stages(theirs.stages, stages, theirs.tokens, ours)),
        answer=None,
    )


def _answer(
    rows: Sequence[Sequence[PictureAgreement]],
    checkpoint: Checkpoint,
    candidates: Sequence[Candidate],
    kept: _Kept,
    question: Question,
    show: Track,
) -> list[list[PictureAgreement]]:
    """Return the rows with what the language models answered, PyTorch's first."""
    recipes = [recipe_of(one.bundle, one.graph) for one in candidates]
    prompts = {recipe: one.bundle for recipe, one in zip(recipes, candidates, strict=True)}
    sides = [(prompts[recipe], tokens) for recipe, tokens in kept.theirs.items()]
    expected = dict(
        zip(kept.theirs, answer_with_torch(checkpoint, sides, question, show), strict=True)
    )
    release_memory()
    answered: dict[int, list[AnswerAgreement]] = {}
    for bundle in {one.bundle.root: one.bundle for one in candidates}.values():
        asked = {
            place: (kept.ours[place], expected[recipes[place]])
            for place, one in enumerate(candidates)
            if one.bundle.root == bundle.root
        }
        answered |= compare_answers(bundle, asked, question, show)
    return [
        [replace(picture, answer=answer) for picture, answer in zip(row, answered[at], strict=True)]
        for at, row in enumerate(rows)
    ]


def _report(
    candidate: Candidate,
    provider: str,
    pictures: Sequence[PictureAgreement],
    tolerances: Tolerances,
    options: VerifyOptions,
) -> CandidateReport:
    graph, spec = candidate.graph, candidate.graph.reducer
    precision = {"vision": str(graph.precision)}
    if not options.vision_only:
        precision["llm"] = candidate.bundle.language_model(options.backend).precision
    summary = summarize(pictures)
    stages = summarize_stages(pictures, tolerances)
    return CandidateReport(
        name=candidate.name,
        bundle=str(candidate.bundle.root),
        engine=candidate.engine,
        provider=provider,
        reducer={"name": spec.name, "tokens": spec.tokens, **spec.options},
        precision=precision,
        pictures=tuple(pictures),
        summary=summary,
        stages=stages,
        first_divergence=find_first_divergence(stages),
        largest_growth=find_largest_growth(stages),
        tolerances=tolerances,
        failures=list_failures(pictures, summary, stages, tolerances),
    )


def _open_bundles(options: VerifyOptions) -> list[Bundle]:
    """Open every bundle once.

    Raises:
        OptionError: there is none, or one is named twice.
    """
    if not options.bundles:
        raise OptionError("No bundle is named, expected the directory of at least one.")
    bundles = [open_bundle(root) for root in options.bundles]
    roots = [bundle.root.resolve() for bundle in bundles]
    twice = sorted({str(root) for root in roots if roots.count(root) > 1})
    if twice:
        raise OptionError(f"{', '.join(twice)} is named more than once. Name each bundle once.")
    return bundles


def _tolerances(bundle: Bundle, graph: VisionGraph, options: VerifyOptions) -> Tolerances:
    llm = None if options.vision_only else bundle.language_model(options.backend).precision
    return replace(tolerances_for(graph.precision, llm), **options.tolerances)


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
