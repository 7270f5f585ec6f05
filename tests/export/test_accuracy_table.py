"""What a checkpoint's table says of a vision graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.errors import CheckpointError
from export.accuracy_table import ACCURACY_FILE, AccuracyTable
from export.reducers import make_reducer, reducer_for_budget

PATCHES = 256
TABLE = {
    "schema": 1,
    "cells": [
        {"reducer": "none", "tokens": 256, "precision": "fp32", "exact": 0.977},
        {"reducer": "visionzip", "tokens": 64, "precision": "fp32", "exact": 0.961},
        {"reducer": "visionzip", "tokens": 64, "precision": "fp16", "exact": 0.96},
        {"reducer": "visionzip_reference", "tokens": 64, "precision": "fp32", "exact": 0.95},
    ],
}


def table_of(root: Path, content: object = TABLE) -> AccuracyTable:
    (root / ACCURACY_FILE).write_text(json.dumps(content))
    return AccuracyTable(root)


def test_cells_are_found(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    zipped = reducer_for_budget("visionzip", 64, PATCHES)
    assert table.accuracy_of(zipped, PATCHES, "fp32") == 0.961
    assert table.accuracy_of(zipped, PATCHES, "fp16") == 0.96
    reference = reducer_for_budget("visionzip", 64, PATCHES, merge="reference")
    assert table.accuracy_of(reference, PATCHES, "fp32") == 0.95
    assert table.accuracy_of(make_reducer("none"), PATCHES, "fp32") == 0.977


def test_what_was_not_measured_is_unknown(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    zipped = reducer_for_budget("visionzip", 64, PATCHES)
    assert table.accuracy_of(zipped, PATCHES, "int8") is None
    assert table.accuracy_of(reducer_for_budget("visionzip", 32, PATCHES), PATCHES, "fp32") is None
    # As many tokens, but not the options that were measured.
    other = make_reducer("visionzip", dominant=10, contextual=54)
    assert table.accuracy_of(other, PATCHES, "fp32") is None
    assert AccuracyTable(tmp_path / "elsewhere").accuracy_of(zipped, PATCHES, "fp32") is None


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"schema": 1},
        {"cells": [{"reducer": "none", "tokens": 64, "precision": "fp32"}]},
        {"cells": [{"reducer": "none", "tokens": 64, "precision": "fp32", "exact": "most"}]},
        {"cells": [{"reducer": "none", "tokens": 64, "precision": "fp32", "exact": 96.1}]},
        {"cells": 3},
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointError, match=r"accuracy_by_budget\.json is not a table"):
        table_of(tmp_path, content)


def test_the_bundled_checkpoint_says_what_a_budget_costs() -> None:
    """Its table is the one that `benchmarks.accuracy` wrote."""
    table = AccuracyTable(Path(__file__).parents[2] / "models" / "pocket-llava")
    shares = [
        table.accuracy_of(reducer_for_budget("visionzip", tokens, 576), 576, "fp32")
        for tokens in (32, 64, 128, 192)
    ]
    assert shares == sorted(shares)
    assert 0.5 < shares[0] < shares[-1] < 1
