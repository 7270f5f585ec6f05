"""Compare bundles with their checkpoint, picture by picture.

Every candidate and PyTorch get the same pixels. PyTorch computes a picture once for all candidates
with the same reducer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
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
from export.verify.candidates import Candidate, open_candidates
from export.verify.reference import LanguageReference, Observation
from export.verify.report import (
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
    BundleLanguage,
    GreedyAnswer,
    Question,
    TorchSide,
    find_checkpoint,
    recipe_of,
    refuse_other_checkpoint,
)
from export.verify.tolerances import Tolerances, tolerances_for
from runtime.vision import Pixels, VisualTokens
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
    progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
    *,
    note: Callable[[str], None] = lambda line: None,
    watch: Watch | None = None,
) -> VerifyReport:
    """Compare bundles with their checkpoint.

    Args:
        options: what to compare.
        progress: wraps the pictures as they are gone through.
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
    with ExitStack() as stack:
        candidates = open_candidates(
            stack,
            graphs,
            options.engines,
            threads=options.threads,
            with_stages=options.stages,
            note=note,
        )
        comparison = _Comparison(stack, checkpoint, candidates, options)
        rows: list[list[PictureAgreement]] = [[] for _ in candidates]
        for file in progress(files):
            for place, row in enumerate(comparison.compare(file, watch)):
                rows[place].append(row)
        limits = dict(zip((bundle.root for bundle in bundles), tolerances, strict=True))
        reports = tuple(
            _report(candidate, row, limits[candidate.bundle.root], options)
            for candidate, row in zip(candidates, rows, strict=True)
        )
    question = None if options.vision_only else options.question
    return VerifyReport(checkpoint.name, question, reports)


class _Comparison:
    """Everything that is open while pictures are compared."""

    def __init__(
        self,
        stack: ExitStack,
        checkpoint: Checkpoint,
        candidates: Sequence[Candidate],
        options: VerifyOptions,
    ) -> None:
        question = Question(options.question, options.max_tokens)
        language = None if options.vision_only else LanguageReference(checkpoint)
        self.candidates = candidates
        self.torch_sides: dict[str, TorchSide] = {}
        self.languages: dict[Path, BundleLanguage] = {}
        for candidate in candidates:
            bundle, recipe = candidate.bundle, recipe_of(candidate.bundle, candidate.graph)
            if recipe not in self.torch_sides:
                side = TorchSide(checkpoint, bundle, candidate.graph, language, question)
                self.torch_sides[recipe] = side
            if language is not None and bundle.root not in self.languages:
                opened = BundleLanguage(bundle, options.backend, options.threads, question)
                self.languages[bundle.root] = opened
                stack.callback(opened.close)

    def compare(self, file: Path, watch: Watch | None) -> Iterable[PictureAgreement]:
        """Compare every candidate on one picture, in their order."""
        picture = load_picture(file)
        seen = {recipe: _look(side, picture) for recipe, side in self.torch_sides.items()}
        for candidate in self.candidates:
            pixels, theirs, answer = seen[recipe_of(candidate.bundle, candidate.graph)]
            ours = candidate.encoder.encode([picture])
            if watch is not None:
                watch(file, candidate, theirs.tokens, ours)
            stages = candidate.stages.run(pixels) if candidate.stages is not None else {}
            language = self.languages.get(candidate.bundle.root)
            yield PictureAgreement(
                file=file.name,
                tokens=(int(theirs.tokens.valid[0]), int(ours.valid[0])),
                visual_tokens=compare_visual_tokens(theirs.tokens, ours),
                stages=tuple(measure_stages(theirs.stages, stages, theirs.tokens, ours)),
                answer=language.compare(answer, ours.tokens_of(0))
                if language is not None and answer is not None
                else None,
            )


def _look(side: TorchSide, picture: Pixels) -> tuple[PixelValues, Observation, GreedyAnswer | None]:
    pixels = side.prepare(picture)
    observation = side.observe(pixels)
    return pixels, observation, side.answer(observation)


def _report(
    candidate: Candidate,
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
        provider=candidate.encoder.session.provider,
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
