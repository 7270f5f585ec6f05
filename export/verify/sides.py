"""The two sides of a comparison: PyTorch on the checkpoint, and a bundle's language model.

PyTorch's side is computed once for all bundles that prepare pictures, reduce tokens and write
prompts in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.agreement.token_metrics import measure_cosine
from engines.bundle import Bundle
from engines.errors import OptionError
from engines.frame_size import frame_size_of
from engines.manifest import VisionGraph
from export.checkpoint.llava import Checkpoint
from export.reducers import make_reducer
from export.verify.reference import LanguageReference, Observation, VisionReference
from export.verify.report import AnswerAgreement
from runtime.backends.opening import open_backend
from runtime.language.generate import Generation, GenerationOptions
from runtime.language.prompt import PromptWriter, Turn
from runtime.vision import Pixels
from runtime.vision.preprocess import PixelValues, preprocess_batch


@dataclass(frozen=True)
class Question:
    """What both language models are asked about each picture."""

    text: str
    max_tokens: int

    @property
    def turns(self) -> list[Turn]:
        """The conversation of one question about one picture."""
        return [Turn("user", self.text, images=1)]


@dataclass(frozen=True)
class GreedyAnswer:
    """What a language model says: logits of its first token, float32[V], and its greedy answer."""

    logits: NDArray[np.float32]
    ids: tuple[int, ...]
    text: str


def recipe_of(bundle: Bundle, graph: VisionGraph) -> str:
    """Return what PyTorch's side depends on, as a key: preprocessing, reducer and prompt."""
    parts = (bundle.preprocessing, graph.reducer, bundle.manifest.prompt)
    return json.dumps([part.model_dump(mode="json") for part in parts], sort_keys=True)


class TorchSide:
    """PyTorch's side for all bundles of one recipe.

    Raises:
        CheckpointError: a tensor of the tower or the projector is missing or misshapen.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        bundle: Bundle,
        graph: VisionGraph,
        language: LanguageReference | None,
        question: Question,
    ) -> None:
        spec = graph.reducer
        self.vision = VisionReference(checkpoint, make_reducer(spec.name, **spec.options))
        self.preprocessing = bundle.preprocessing
        self.language = language
        self.question = question
        self.prompt = PromptWriter(bundle) if language is not None else None

    def prepare(self, picture: Pixels) -> PixelValues:
        """Return the pixels that both sides get, float32[1, 3, H, W]."""
        return preprocess_batch([picture], self.preprocessing)

    def observe(self, pixel_values: PixelValues) -> Observation:
        """Return what PyTorch makes of prepared pixels."""
        return self.vision.observe(pixel_values)

    def answer(self, seen: Observation) -> GreedyAnswer | None:
        """Return what PyTorch says of what it saw; None where it is not asked."""
        if self.language is None or self.prompt is None:
            return None
        parts = self.prompt.parts(self.question.turns, [seen.tokens.tokens_of(0)])
        logits, ids = self.language.answer(
            parts, self.question.max_tokens, self.prompt.stop_token_ids
        )
        return GreedyAnswer(logits, tuple(ids), self.prompt.tokenizer.decode(ids))


class BundleLanguage:
    """A bundle's own language model."""

    def __init__(
        self, bundle: Bundle, backend: str | None, threads: int | None, question: Question
    ) -> None:
        self.prompt = PromptWriter(bundle)
        self.backend = open_backend(bundle, backend, threads=threads)
        self.question = question

    def compare(self, expected: GreedyAnswer, tokens: NDArray[np.float32]) -> AnswerAgreement:
        """Ask the question and compare with what PyTorch answered.

        Args:
            expected: PyTorch's answer.
            tokens: float32[valid, D]; the bundle's visual tokens. Without a number in one of
                them nothing is asked, and the cosine is NaN.
        """
        given = self._answer(tokens) if np.isfinite(tokens).all() else None
        if given is None:
            return AnswerAgreement(float("nan"), False, expected.text, "")
        logits = expected.logits[: len(given.logits)]
        return AnswerAgreement(
            logits_cosine=float(measure_cosine(logits, given.logits)),
            equal=given.ids == expected.ids,
            reference=expected.text,
            bundle=given.text,
        )

    def _answer(self, tokens: NDArray[np.float32]) -> GreedyAnswer | None:
        self.backend.rewind(0)
        logits = self.backend.prefill(self.prompt.parts(self.question.turns, [tokens]))
        if np.isnan(logits).any():
            return None
        generation = Generation(
            self.backend,
            logits,
            self.prompt.tokenizer,
            stop_token_ids=self.prompt.stop_token_ids,
            options=GenerationOptions(max_tokens=self.question.max_tokens),
        )
        for _ in generation:
            pass
        return GreedyAnswer(logits, tuple(generation.token_ids), generation.text)

    def close(self) -> None:
        """Free the language model."""
        self.backend.close()


def find_checkpoint(bundles: Sequence[Bundle]) -> str:
    """Return where the checkpoint lies whose name bundles record.

    Raises:
        OptionError: they record several; or it is neither here nor in ``models/``, and not the
            name of a repository.
    """
    names = {bundle.manifest.model: bundle.root for bundle in bundles}
    if len(names) > 1:
        told = ", ".join(f"{root} from {name}" for name, root in names.items())
        raise OptionError(
            f"The bundles were built from different checkpoints: {told}. Compare those of one "
            "checkpoint with each other, or give the checkpoint with --model."
        )
    name = next(iter(names))
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
        OptionError: a size differs; all that do are named. Or the bundle takes camera frames.
    """
    manifest = bundle.manifest
    if manifest.tiles is not None:
        raise OptionError(
            f"{bundle.root} cuts pictures into tiles, and this comparison is made of pictures that "
            "are one square each. `tests/export/test_llava_next.py` compares such bundles with "
            "transformers."
        )
    if frame_size_of(manifest.vision_files.files[0]) is not None:
        raise OptionError(
            f"{bundle.root} takes camera frames of one size, and both sides are compared on pixels "
            "of pictures of any size. Build it without --input uint8 as well and verify that one: "
            "all that differs is how a frame becomes pixels."
        )
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
