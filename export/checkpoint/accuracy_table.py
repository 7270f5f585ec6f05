"""Read the measured accuracy of each budget from a checkpoint's `accuracy_by_budget.json`.

`benchmarks.accuracy` writes that file beside the weights: reducer -> precision -> tokens ->
``exact``. A budget without an entry gets None.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError
from export.reducers import REDUCERS, Reducer, reducer_for_budget

ACCURACY_FILE = "accuracy_by_budget.json"
_VARIANTS = ("merge", "layout")
"""Options that are measured, each other value than the usual one under a name of its own."""


class AccuracyTable:
    """The measured accuracy of a checkpoint; empty where none was measured."""

    def __init__(self, checkpoint: Path) -> None:
        """Read the checkpoint's table, if it has one.

        Raises:
            CheckpointError: the file is not such a table.
        """
        self._file = checkpoint / ACCURACY_FILE
        self._cells: Any = {}
        if not self._file.is_file():
            return
        try:
            self._cells = json.loads(self._file.read_text("utf-8"))["reducers"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(repr(error)) from error

    def accuracy_of(self, reducer: Reducer, patches: int, precision: str) -> float | None:
        """Return the share of questions answered exactly; None where it was not measured.

        Measured are the options that a budget implies. Another merge or layout than the usual one
        stands under a name of its own, such as ``visionzip_reference``.

        Args:
            reducer: of the graph.
            patches: how many the tower has.
            precision: of the graph.

        Raises:
            CheckpointError: the table holds something else.
        """
        tokens = reducer.token_count(patches)
        name = reducer.name
        variants = {key: reducer.options[key] for key in _VARIANTS if key in reducer.options}
        if name != "none":
            implied = reducer_for_budget(name, tokens, patches, **variants)
            if reducer.options != implied.options:
                return None
            usual = {field.name: field.default for field in fields(REDUCERS[name])}
            others = [str(value) for key, value in variants.items() if value != usual[key]]
            name = "_".join([name, *others])
        try:
            cell = self._cells.get(name, {}).get(precision, {}).get(str(tokens))
            exact = None if cell is None else float(cell["exact"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(repr(error)) from error
        if exact is not None and not 0 <= exact <= 1:
            raise self._damaged(f"{name}, {precision}, {tokens} tokens: {exact} is not a share")
        return exact

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file} is not a table of accuracy by budget: {why}. Write it again with "
            "`python -m benchmarks.accuracy --write`, or delete it."
        )
