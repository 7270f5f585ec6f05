"""What a checkpoint's table says of a vision graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.errors import CheckpointError
from export.checkpoint.accuracy_table import ACCURACY_FILE, AccuracyTable
from export.reducers import make_reducer, reducer_for_budget

PATCHES = 256
TABLE = {
    "schema": 1,
    "reducers": {
        "none": {"fp32": {"256": {"exact": 0.977}}},
        "visionzip": {"fp32": {"64": {"exact": 0.961}}, "fp16": {"64": {"exact": 0.96}}},
        "visionzip_reference": {"fp32": {"64": {"exact": 0.95}}},
        "uniform_sequential": {"fp32": {"31": {"exact": 0.5}}},
        "scope": {"fp32": {"16": {"exact": 0.94}}},
    },
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
    spread = make_reducer("uniform", budget=31, layout="sequential")
    assert table.accuracy_of(spread, PATCHES, "fp32") == 0.5
    assert table.accuracy_of(make_reducer("scope", budget=16), PATCHES, "fp32") == 0.94


def test_what_was_not_measured_is_unknown(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    zipped = reducer_for_budget("visionzip", 64, PATCHES)
    assert table.accuracy_of(zipped, PATCHES, "int8") is None
    assert table.accuracy_of(reducer_for_budget("visionzip", 32, PATCHES), PATCHES, "fp32") is None
    # As many tokens, but not the options that were measured.
    other = make_reducer("visionzip", dominant=10, contextual=54)
    assert table.accuracy_of(other, PATCHES, "fp32") is None
    merged = make_reducer("scope", budget=16, merge="nearest")
    assert table.accuracy_of(merged, PATCHES, "fp32") is None
    assert table.accuracy_of(make_reducer("scope", budget=16, alpha=1), PATCHES, "fp32") is None
    assert table.accuracy_of(make_reducer("uniform", budget=16), PATCHES, "fp32") is None
    assert AccuracyTable(tmp_path / "elsewhere").accuracy_of(zipped, PATCHES, "fp32") is None


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"schema": 1},
        {"reducers": {"visionzip": {"fp32": {"64": {"exact": "most"}}}}},
        {"reducers": {"visionzip": {"fp32": {"64": {}}}}},
        {"reducers": {"visionzip": {"fp32": {"64": {"exact": 96.1}}}}},
        {"reducers": {"visionzip": 3}},
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointError, match=r"accuracy_by_budget\.json is not a table"):
        table_of(tmp_path, content).accuracy_of(
            reducer_for_budget("visionzip", 64, PATCHES), PATCHES, "fp32"
        )
