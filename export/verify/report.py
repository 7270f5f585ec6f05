"""The result of a verification: each picture, each stage, the worst values and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np

from calibration.agreement.stages import SELECTION, StageError
from calibration.agreement.token_metrics import TokenAgreement, average_agreement
from export.verify.tolerances import Tolerances


@dataclass(frozen=True)
class AnswerAgreement:
    """Two greedy answers about one picture.

    Attributes:
        logits_cosine: of the first token's logits.
        equal: whether all token ids are the same.
        reference: PyTorch's answer.
        bundle: the bundle's.
    """

    logits_cosine: float
    equal: bool
    reference: str
    bundle: str


@dataclass(frozen=True)
class PictureAgreement:
    """What one picture showed.

    Attributes:
        file: its name.
        tokens: how many valid visual tokens PyTorch and the bundle made.
        visual_tokens: how far they agree.
        stages: the error of each stage, in the order they are computed.
        answer: None where the language model was left out.
    """

    file: str
    tokens: tuple[int, int]
    visual_tokens: TokenAgreement
    stages: tuple[StageError, ...]
    answer: AnswerAgreement | None


@dataclass(frozen=True)
class StageSummary:
    """One stage over all pictures.

    Attributes:
        stage: its name.
        mean: of the errors.
        worst: of the errors.
        growth: mean of the error less that of the stage before.
        limit: what the worst is measured by; past it the stage has diverged.
    """

    stage: str
    mean: float
    worst: float
    growth: float
    limit: float

    @property
    def diverged(self) -> bool:
        """Whether the worst error is past its limit; NaN always is."""
        return not self.worst <= self.limit


@dataclass(frozen=True)
class CandidateReport:
    """One bundle on one engine.

    Attributes:
        name: the bundle and the engine.
        bundle: its directory.
        engine: its name.
        provider: what ran the graph, in the engine's own words.
        reducer: name, number of tokens and options of the reducer in the graph.
        precision: of the vision graph and of the decoder.
        pictures: one each.
        summary: the worst of each measure and, as ``..._mean``, some means.
        stages: in the order they are computed.
        first_divergence: the first stage past its limit.
        largest_growth: the stage that adds most to the error.
        tolerances: what was asked of the measures.
        failures: what is past its tolerance, one phrase each.
    """

    name: str
    bundle: str
    engine: str
    provider: str
    reducer: dict[str, Any]
    precision: dict[str, str]
    pictures: tuple[PictureAgreement, ...]
    summary: dict[str, float]
    stages: tuple[StageSummary, ...]
    first_divergence: str | None
    largest_growth: str | None
    tolerances: Tolerances
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether everything is within its tolerance."""
        return not self.failures


@dataclass(frozen=True)
class VerifyReport:
    """The comparison of all candidates.

    Attributes:
        model: name of the checkpoint.
        question: what was asked; None where the language models were left out.
        candidates: one for each bundle and engine.
    """

    model: str
    question: str | None
    candidates: tuple[CandidateReport, ...]

    @property
    def passed(self) -> bool:
        """Whether every candidate did."""
        return all(candidate.passed for candidate in self.candidates)


def summarize(pictures: Sequence[PictureAgreement]) -> dict[str, float]:
    """Return the worst of each measure, NaN before all; `Tolerances` has the same names."""
    seen = [picture.visual_tokens for picture in pictures]
    average = asdict(average_agreement(seen))
    summary = {
        "absolute": float(np.max([one.difference.max_abs for one in seen])),
        "relative": float(np.max([one.difference.max_relative for one in seen])),
        "overlap": float(np.min([one.overlap for one in seen])),
        "assignment": float(np.min([one.assignment for one in seen])),
        "cosine": float(np.min([one.cosine for one in seen])),
        **{f"{name}_mean": average[name] for name in ("overlap", "assignment", "cosine")},
    }
    answers = [picture.answer for picture in pictures if picture.answer is not None]
    if answers:
        summary["logits_cosine"] = float(np.min([one.logits_cosine for one in answers]))
        summary["equal_answers"] = sum(one.equal for one in answers) / len(answers)
    return summary


def summarize_stages(
    pictures: Sequence[PictureAgreement], tolerances: Tolerances
) -> tuple[StageSummary, ...]:
    """Return each stage over all pictures."""
    summaries = []
    for column in zip(*(picture.stages for picture in pictures), strict=True):
        stage = column[0].stage
        errors = [one.error for one in column]
        limit = 1.0 - tolerances.overlap if stage == SELECTION else tolerances.stage
        summaries.append(
            StageSummary(
                stage=stage,
                mean=float(np.mean(errors)),
                worst=float(np.max(errors)),
                growth=float(np.mean([one.growth for one in column])),
                limit=limit,
            )
        )
    return tuple(summaries)


def find_first_divergence(stages: Sequence[StageSummary]) -> str | None:
    """Return the first stage past its limit."""
    return next((one.stage for one in stages if one.diverged), None)


def find_largest_growth(stages: Sequence[StageSummary]) -> str | None:
    """Return the stage that adds most to the error; the first that is not a number before all."""
    growing = [one for one in stages if one.stage != SELECTION]
    if not growing:
        return None
    return growing[int(np.argmax([one.growth for one in growing]))].stage


def list_failures(
    pictures: Sequence[PictureAgreement],
    summary: Mapping[str, float],
    stages: Sequence[StageSummary],
    tolerances: Tolerances,
) -> tuple[str, ...]:
    """Return the reasons why a candidate fails, one phrase each."""
    failures = tolerances.failures(summary)
    first = next((one for one in stages if not isfinite(one.worst)), None)
    if first is not None:
        at = [one.stage for one in stages].index(first.stage)
        bad = [one for one in pictures if not one.stages[at].is_finite]
        told = f"{first.stage} is the first stage with NaN or infinity, in "
        told += _listed([one.file for one in bad])
        if not all(one.stages[at].reference_is_finite for one in bad):
            told += "; PyTorch has it too, so the checkpoint is damaged"
        failures.insert(0, told)
    return tuple(failures)


def _listed(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def rank_worst(candidates: Sequence[CandidateReport], most: int) -> list[str]:
    """Return the files of the worst pictures, the worst first.

    What is not a number comes first, then other answers, then the least overlap of kept patches,
    agreement of the merged ones and cosine.
    """
    rows = list(zip(*(one.pictures for one in candidates), strict=True))
    ranked = sorted(rows, key=lambda row: min(_badness(one) for one in row))
    return [row[0].file for row in ranked[:most]]


def find_worst(candidates: Sequence[CandidateReport], file: str) -> int:
    """Return which candidate did worst on a picture; see `rank_worst`."""
    rows = [next(row for row in one.pictures if row.file == file) for one in candidates]
    return min(range(len(rows)), key=lambda at: _badness(rows[at]))


def _badness(row: PictureAgreement) -> tuple[float, ...]:
    """Return a key that sorts the worst first."""
    seen = row.visual_tokens
    if not isfinite(seen.cosine):
        return (0.0,)
    equal = row.answer is None or row.answer.equal
    return (2.0 if equal else 1.0, seen.overlap, seen.assignment, seen.cosine)


def json_from_report(report: VerifyReport) -> dict[str, Any]:
    """Return the report as JSON can hold it: a number that is not finite becomes null."""
    document = {"passed": report.passed, **asdict(report)}
    document["candidates"] = [
        {"passed": candidate.passed, **asdict(candidate)} for candidate in report.candidates
    ]
    finite: dict[str, Any] = _finite(document)
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
