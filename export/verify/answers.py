"""Compare what language models answer, with one of them in memory at a time.

The vision graphs are closed by then. Their visual tokens lie on the disk: of many pictures they are
more than a language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.agreement.token_metrics import measure_cosine
from engines.bundle import Bundle
from export.checkpoint.llava import Checkpoint
from export.release_memory import release_memory
from export.tracks import Track
from export.verify.reference import LanguageReference
from export.verify.report import AnswerAgreement
from runtime.backends.context import Context
from runtime.backends.opening import open_backend
from runtime.language.generate import Generation, GenerationOptions
from runtime.language.prompt import PromptWriter, Turn
from runtime.vision import VisualTokens


@dataclass(frozen=True)
class Question:
    """What both language models are asked about each picture.

    Attributes:
        text: the question.
        max_tokens: longest answer.
        backend: of the bundles' language models; None is a bundle's first.
        threads: CPU threads of the bundles' side.
    """

    text: str
    max_tokens: int
    backend: str | None
    threads: int | None

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


class KeptTokens:
    """The visual tokens that one side made of each picture, in files.

    Args:
        folder: where they are written; made here, the caller's to remove.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.count = 0

    def add(self, seen: VisualTokens) -> None:
        """Keep those of the next picture."""
        np.save(self.folder / f"{self.count}.npy", seen.tokens_of(0))
        self.count += 1

    def read(self, at: int) -> NDArray[np.float32]:
        """Return those of a picture, float32[valid, D]."""
        tokens: NDArray[np.float32] = np.load(self.folder / f"{at}.npy", allow_pickle=False)
        return tokens


def check_language_models(bundles: Sequence[Bundle], question: Question) -> None:
    """Open the language model of each bundle once, so that what is wrong with one is told first.

    Raises:
        FoveateError: it cannot be opened here.
    """
    for bundle in bundles:
        open_backend(bundle, question.backend, threads=question.threads).close()
    release_memory()


def answer_with_torch(
    checkpoint: Checkpoint,
    sides: Sequence[tuple[Bundle, KeptTokens]],
    question: Question,
    show: Track,
) -> list[list[GreedyAnswer]]:
    """Return PyTorch's answer about each picture, side by side.

    Args:
        checkpoint: what answers.
        sides: a bundle that writes the prompt, and what PyTorch saw.
        question: what to ask.
        show: shows how far it is.

    Raises:
        CheckpointError: a tensor of the language model is missing or misshapen.
    """
    reference = LanguageReference(checkpoint)
    answers: list[list[GreedyAnswer]] = []
    for bundle, kept in sides:
        prompt = PromptWriter(bundle)
        answers.append([])
        for at in show(range(kept.count), "PyTorch answers"):
            parts = prompt.parts(question.turns, [kept.read(at)])
            logits, ids = reference.answer(parts, question.max_tokens, prompt.stop_token_ids)
            answers[-1].append(GreedyAnswer(logits, tuple(ids), prompt.tokenizer.decode(ids)))
    return answers


def compare_answers(
    bundle: Bundle,
    candidates: Mapping[int, tuple[KeptTokens, Sequence[GreedyAnswer]]],
    question: Question,
    show: Track,
) -> dict[int, list[AnswerAgreement]]:
    """Ask a bundle's language model about each picture, and compare with what PyTorch answered.

    Args:
        bundle: whose language model.
        candidates: by any number; what a vision graph of the bundle saw, and PyTorch's answers.
        question: what to ask.
        show: shows how far it is.

    Raises:
        FoveateError: it cannot be opened here.
    """
    with _BundleLanguage(bundle, question) as language:
        found: dict[int, list[AnswerAgreement]] = {}
        for number, (kept, expected) in candidates.items():
            found[number] = [
                language.compare(expected[at], kept.read(at))
                for at in show(range(kept.count), f"{bundle.root.name} answers")
            ]
    return found


class _BundleLanguage:
    """A bundle's own language model."""

    def __init__(self, bundle: Bundle, question: Question) -> None:
        self.prompt = PromptWriter(bundle)
        self.backend = open_backend(bundle, question.backend, threads=question.threads)
        self.question = question

    def __enter__(self) -> _BundleLanguage:
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.close()

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
        context = Context(self.backend)  # holds nothing of the picture before
        logits = context.prefill(self.prompt.parts(self.question.turns, [tokens]))
        if np.isnan(logits).any():
            return None
        generation = Generation(
            context,
            logits,
            self.prompt.tokenizer,
            stop_token_ids=self.prompt.stop_token_ids,
            options=GenerationOptions(max_tokens=self.question.max_tokens),
        )
        for _ in generation:
            pass
        return GreedyAnswer(logits, tuple(generation.token_ids), generation.text)
