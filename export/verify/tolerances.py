"""How far a bundle may differ from its checkpoint, by the precision it computes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated

import typer

from engines.errors import OptionError
from engines.manifest import Precision


@dataclass(frozen=True)
class Tolerances:
    """Limits on the worst picture; each field's name is that of the measure it limits.

    Attributes:
        relative: largest difference of visual tokens made of the same, over the largest value.
        overlap: least intersection over union of the kept patches.
        cosine: least cosine of a visual token with its counterpart made of the same.
        assignment: least share of the patches kept by neither side that went the same way.
        stage: largest error of a stage, over the length of its values. It gives no verdict; the
            first stage past it is where to look.
        logits_cosine: least cosine of the first token's logits.
        equal_answers: least share of greedy answers that are equal.
    """

    relative: Annotated[
        float,
        typer.Option("--max-relative", help="Largest difference of a visual token, relative."),
    ]
    overlap: Annotated[
        float, typer.Option("--min-overlap", help="Least overlap (IoU) of the kept patches.")
    ]
    cosine: Annotated[float, typer.Option("--min-cosine", help="Least cosine of a visual token.")]
    assignment: Annotated[
        float,
        typer.Option("--min-assignment", help="Least share of dropped patches merged alike."),
    ] = 0.0
    stage: float = 1e-4
    logits_cosine: Annotated[
        float,
        typer.Option("--min-logits-cosine", help="Least cosine of the first token's logits."),
    ] = 0.0
    equal_answers: Annotated[
        float,
        typer.Option("--min-equal-answers", help="Least share of equal greedy answers."),
    ] = 0.0

    def __post_init__(self) -> None:
        problems = []
        for field in fields(self):
            value = getattr(self, field.name)
            most = None if field.name in ("relative", "stage") else 1.0
            if not value >= 0 or (most is not None and value > most):
                expected = "0 or more" if most is None else "0 to 1"
                problems.append(f"{field.name} is {value}, expected {expected}")
        if problems:
            raise OptionError(f"Tolerances cannot be these: {'; '.join(problems)}.")

    def failures(self, summary: Mapping[str, float]) -> list[str]:
        """Return a sentence for each measure that is past its limit; NaN always is."""
        told = []
        for field in fields(self):
            name, limit = field.name, getattr(self, field.name)
            if name not in summary:
                continue
            value = summary[name]
            at_most = name == "relative"
            if not (value <= limit if at_most else value >= limit):
                told.append(
                    f"{name} is {value:.6g}, expected at {'most' if at_most else 'least'} {limit:g}"
                )
        return told


_VISION: dict[Precision, Tolerances] = {
    "fp32": Tolerances(relative=1e-3, overlap=1.0, cosine=0.9999, assignment=0.99, stage=1e-4),
    "fp16": Tolerances(relative=0.05, overlap=0.9, cosine=0.99, assignment=0.5, stage=0.01),
    "int8": Tolerances(relative=0.5, overlap=0.7, cosine=0.9, assignment=0.3, stage=0.1),
    "fp8": Tolerances(relative=0.5, overlap=0.7, cosine=0.9, assignment=0.3, stage=0.1),
    "mixed": Tolerances(relative=0.5, overlap=0.7, cosine=0.9, assignment=0.3, stage=0.1),
}
_LOGITS_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int4": 0.9}
_EQUAL_ANSWERS = {"fp32": 0.9}


def tolerances_for(vision: Precision, llm: str | None) -> Tolerances:
    """Return the default tolerances of a bundle.

    Args:
        vision: precision of its vision graph.
        llm: precision of its decoder; None when it is left out.
    """
    limits = _VISION[vision]
    if llm is None:
        return limits
    exact = vision == "fp32"
    return replace(
        limits,
        logits_cosine=min(_LOGITS_COSINE.get(llm, 0.9), 1.0 if exact else 0.9),
        equal_answers=_EQUAL_ANSWERS.get(llm, 0.0) if exact else 0.0,
    )
