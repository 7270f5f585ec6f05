"""What a verification found, picture by picture and at its worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from calibration.agreement import (
    Difference,
    kept_overlap,
    match_tokens,
    measure_cosine,
    measure_difference,
)
from export.tolerances import Tolerances
from runtime.vision import VisualTokens


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
        tokens: how many valid visual tokens the bundle made.
        outputs: by output of the vision graph; ``visual_tokens`` are compared patch by patch.
        overlap: intersection over union of the kept patches.
        cosine: the lowest of the visual tokens that both sides have.
        answer: None where the language model was left out.
    """

    file: str
    tokens: int
    outputs: dict[str, Difference]
    overlap: float
    cosine: float
    answer: AnswerAgreement | None


@dataclass(frozen=True)
class VerifyReport:
    """The comparison of all pictures.

    Attributes:
        bundle: its directory.
        model: name of the checkpoint.
        reducer: name, number of tokens and options of the reducer in the graph.
        precision: of the vision graph and of the decoder.
        pictures: one each.
        summary: the worst of each measure, and the share of equal answers.
        tolerances: what was asked of them.
        failures: what is past its tolerance, one phrase each.
    """

    bundle: str
    model: str
    reducer: dict[str, Any]
    precision: dict[str, str]
    pictures: tuple[PictureAgreement, ...]
    summary: dict[str, float]
    tolerances: Tolerances
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether everything is within its tolerance."""
        return not self.failures


def compare_visual_tokens(
    file: str, reference: VisualTokens, bundle: VisualTokens, answer: AnswerAgreement | None = None
) -> PictureAgreement:
    """Compare two batches of one picture, the reference first."""
    theirs, ours = reference.picture(0), bundle.picture(0)  # [valid, D] each
    their_origin, our_origin = reference.origin[0, : len(theirs)], bundle.origin[0, : len(ours)]
    at_theirs, at_ours = match_tokens(their_origin, our_origin)
    theirs, ours = theirs[at_theirs], ours[at_ours]
    cosine = measure_cosine(theirs, ours)
    return PictureAgreement(
        file=file,
        tokens=int(bundle.valid[0]),
        outputs={
            "visual_tokens": measure_difference(theirs, ours),
            "valid_count": measure_difference(reference.valid, bundle.valid),
            "patch_index": measure_difference(reference.origin, bundle.origin),
            "assignment": measure_difference(reference.assignment, bundle.assignment),
        },
        overlap=kept_overlap(their_origin, our_origin),
        cosine=float(cosine.min()) if len(cosine) else 0.0,
        answer=answer,
    )


def summarize(pictures: Sequence[PictureAgreement]) -> dict[str, float]:
    """Return the worst of each measure; `Tolerances` has the same names."""
    tokens = [picture.outputs["visual_tokens"] for picture in pictures]
    summary = {
        "absolute": float(np.max([one.max_abs for one in tokens])),  # NaN stays NaN
        "relative": float(np.max([one.max_relative for one in tokens])),
        "overlap": min(picture.overlap for picture in pictures),
        "cosine": float(np.min([picture.cosine for picture in pictures])),
    }
    answers = [picture.answer for picture in pictures if picture.answer is not None]
    if answers:
        summary["logits_cosine"] = float(np.min([one.logits_cosine for one in answers]))
        summary["equal_answers"] = sum(one.equal for one in answers) / len(answers)
    return summary


def json_from_report(report: VerifyReport) -> dict[str, Any]:
    """Return the report as JSON can hold it: a number that is not finite becomes null."""
    document = {"passed": report.passed, **asdict(report)}
    finite: dict[str, Any] = _finite(document)
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def table_from_report(report: VerifyReport) -> Table:
    """Return one row per picture and the worst of each column."""
    answered = "logits_cosine" in report.summary
    columns = ["tokens", "max abs", "relative", "patches", "cosine"]
    columns += ["logits", "answer"] if answered else []
    table = Table(box=SIMPLE, show_footer=True, padding=0, pad_edge=False)
    table.add_column("picture", f"worst of {len(report.pictures)}", overflow="fold")
    worst = report.summary
    footers = ["", f"{worst['absolute']:.1e}", f"{worst['relative']:.1e}"]
    footers += [f"{worst['overlap']:.1%}", f"{worst['cosine']:.5f}"]
    if answered:
        footers += [f"{worst['logits_cosine']:.5f}", f"{worst['equal_answers']:.0%}"]
    for column, footer in zip(columns, footers, strict=True):
        table.add_column(column, footer, justify="right", no_wrap=True)
    for picture in report.pictures:
        difference = picture.outputs["visual_tokens"]
        row = [escape(picture.file), str(picture.tokens)]
        row += [f"{difference.max_abs:.1e}", f"{difference.max_relative:.1e}"]
        row += [f"{picture.overlap:.1%}", f"{picture.cosine:.5f}"]
        if picture.answer is not None:
            row += [f"{picture.answer.logits_cosine:.5f}"]
            row += ["equal" if picture.answer.equal else "differs"]
        table.add_row(*row)
    return table
