"""Fill the table of boards in docs/jetson.md with what `benchmarks.gpu --write` measured.

Each board has a row for each way. A board that is not in the table gets rows of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.errors import OptionError

BEGIN, END = "<!-- boards begin -->", "<!-- boards end -->"
COLUMNS = ("board", "way", "median ms", "p90 ms", "power, W", "memory, MB", "measured")
MISSING = "not measured yet"
BOARDS = {
    "Jetson AGX Orin": ("AGX Orin",),
    "Jetson Orin NX": ("Orin NX",),
    "Jetson Orin Nano": ("Orin Nano",),
    "Jetson AGX Thor": ("Thor",),
}
"""Board -> words that the model in its device tree has."""
WAYS = ("TensorRT, FP16", "ONNX Runtime CUDA, FP16", "papers' PyTorch path, FP16")


@dataclass(frozen=True)
class BoardRow:
    """One way on one board.

    Attributes:
        board: its name.
        way: how CLIP-L was run.
        median_ms: of a batch; None where it could not be run.
        p90_ms: of a batch.
        power_w: mean while it ran; None where the machine does not tell it.
        memory_mb: what the way took.
        measured: date, JetPack, power mode and versions; or why there is no number.
    """

    board: str
    way: str
    median_ms: float | None = None
    p90_ms: float | None = None
    power_w: float | None = None
    memory_mb: float | None = None
    measured: str = MISSING

    def line(self) -> str:
        """Return the row as Markdown."""
        numbers = (
            ("-" if value is None else f"{value:.{digits}f}")
            for value, digits in (
                (self.median_ms, 2),
                (self.p90_ms, 2),
                (self.power_w, 1),
                (self.memory_mb, 0),
            )
        )
        return f"| {self.board} | {self.way} | {' | '.join(numbers)} | {self.measured} |"


def empty_table() -> str:
    """Return the table of all boards before anything was measured."""
    return _table([BoardRow(board, way).line() for board in BOARDS for way in WAYS])


def fill_table(page: Path, rows: Sequence[BoardRow]) -> None:
    """Put rows into the page's table, in the place of those of the same board and way.

    Raises:
        OptionError: the page cannot be read, or has no table between the two marks.
    """
    try:
        text = page.read_text("utf-8")
    except OSError as error:
        raise OptionError(
            f"--write {page}: cannot be read ({error.strerror}). Run it in the repository, whose "
            "docs/jetson.md has the table."
        ) from error
    before, found, rest = text.partition(BEGIN)
    table, ended, after = rest.partition(END)
    if not found or not ended:
        raise OptionError(
            f"--write {page}: has no table between {BEGIN} and {END}. Give docs/jetson.md."
        )
    lines = {_key(line): line for line in table.strip().splitlines()[2:]}
    for row in rows:
        lines[row.board, row.way] = row.line()
    known = {board: place for place, board in enumerate(BOARDS)}
    ordered = sorted(lines, key=lambda key: known.get(key[0], len(known)))  # stable within a board
    filled = _table([lines[key] for key in ordered])
    page.write_text(f"{before}{BEGIN}\n{filled}\n{END}{after}", encoding="utf-8")


def _key(line: str) -> tuple[str, str]:
    _, board, way, *_ = (cell.strip() for cell in line.split("|"))
    return board, way


def _table(lines: Sequence[str]) -> str:
    head = f"| {' | '.join(COLUMNS)} |"
    return "\n".join([head, "|---|---|---:|---:|---:|---:|---|", *lines])
