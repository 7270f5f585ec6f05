"""What `benchmarks.few_tokens` measured, as a table.

Enters: the answers of each row, for one checkpoint or several. Leaves: Markdown. Shares of right
answers have Wilson's 95 % intervals; what is kept of the accuracy of all tokens is of the same
questions, bootstrapped over pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.packed_answers import Examination

from evaluate import paired_interval, wilson_interval  # isort: skip - found by packed_answers


@dataclass(frozen=True)
class Answers:
    """One row of one checkpoint.

    Attributes:
        reducer: what the table calls it.
        tokens: the budget.
        mean_tokens: real visual tokens of a picture, on average.
        most_tokens: of the picture that has most.
        covered: share of patches that resemble a token, on average.
        right: bool[Q]; which questions were answered exactly.
    """

    reducer: str
    tokens: int
    mean_tokens: float
    most_tokens: int
    covered: float
    right: NDArray[np.bool_]

    def to_line(self) -> str:
        """Return it as a line of the results file."""
        bits = np.packbits(self.right).tobytes().hex()
        return json.dumps({**asdict(self), "right": bits, "questions": len(self.right)})

    @staticmethod
    def from_line(line: str) -> Answers:
        """Read a line of the results file."""
        fields: dict[str, Any] = json.loads(line)
        bits = np.frombuffer(bytes.fromhex(fields["right"]), np.uint8)
        right = np.unpackbits(bits, count=fields.pop("questions")).astype(bool)
        return Answers(**{**fields, "right": right})


@dataclass(frozen=True)
class Column:
    """One checkpoint.

    Attributes:
        name: of its directory.
        rows: the first with all tokens; the same rows in every column.
        examination: the questions.
    """

    name: str
    rows: Sequence[Answers]
    examination: Examination

    def cells(self, at: int) -> list[str]:
        """Return a row's exact match, and how much it keeps of the accuracy of all tokens."""
        right, everything = self.rows[at].right, self.rows[0].right
        low, high = (100 * end for end in wilson_interval(int(right.sum()), len(right)))
        exact = f"{right.mean():.1%} ({low:.1f} to {high:.1f})"
        if at == 0:
            return [exact, ""]
        ends = paired_interval(right, everything, self.examination.picture_of, ratio=True)
        low, high = (100 * end for end in ends)
        return [exact, f"{right.mean() / everything.mean():.1%} ({low:.1f} to {high:.1f})"]


def table_from_columns(columns: Sequence[Column]) -> str:
    """Return what was asked and a Markdown table, a row for each reducer and budget."""
    first = columns[0]
    head = ["tokens", "reducer", "tokens used", "patches covered"]
    for column in columns:
        head += [f"{column.name}: exact match (95 %)", f"{column.name}: kept of all (95 %)"]
    lines = [head, ["---:", "---", *["---:"] * (len(head) - 2)]]
    for at, row in enumerate(first.rows):
        same = [column.rows[at] for column in columns]
        used = f"{np.mean([one.mean_tokens for one in same]):.1f}"
        if "coverage" in row.reducer:
            used += f", at most {max(one.most_tokens for one in same)}"
        covered = f"{np.mean([one.covered for one in same]):.1%}"
        cells = [cell for column in columns for cell in column.cells(at)]
        lines.append([str(row.tokens), row.reducer, used, covered, *cells])
    asked = first.examination
    said = f"{len(asked.types):,} questions about {len(asked.pictures):,} pictures, float32."
    return said + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
