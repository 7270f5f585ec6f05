"""The benchmark of few tokens: its rows, its label-free measure, its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import few_tokens
from benchmarks.few_tokens_report import Answers, Column, table_from_columns
from benchmarks.packed_answers import POCKET, Examination
from export.checkpoint.llava import open_checkpoint
from export.reducers import Reduced


@pytest.fixture(scope="module")
def examination() -> Examination:
    return Examination(POCKET, POCKET / "test", pictures=2)


def answers(name: str, tokens: int, wrong: int, examination: Examination) -> Answers:
    right = np.ones(len(examination.types), bool)
    right[:wrong] = False
    return Answers(name, tokens, tokens / 2, tokens, 0.25, right)


def test_rows_are_every_reducer_and_budget_and_those_by_content() -> None:
    names = [*few_tokens.REDUCERS, "coverage"]
    checkpoint = open_checkpoint(str(POCKET))
    rows = list(few_tokens.list_rows(names, few_tokens.BUDGETS, checkpoint))
    assert len(rows) == 1 + len(few_tokens.REDUCERS) * 5 + len(few_tokens.COVERAGES)
    assert len({(name, tokens) for name, tokens, _ in rows}) == len(rows)
    for name, tokens, reducer in rows:
        assert reducer.token_count(checkpoint.patch_side**2) == tokens
        assert ("coverage" in name) == (reducer.options.get("coverage", 1.0) != 1.0)


def test_a_patch_is_covered_by_a_token_that_resembles_it() -> None:
    features = torch.tensor([[[1.0, 0.0], [5.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])  # the second is padding
    reduced = Reduced(tokens, torch.tensor([1]), torch.tensor([[0, -1]]), torch.zeros(1, 4).long())
    assert few_tokens.share_covered(features, reduced).tolist() == [0.5]


def test_answers_survive_their_file(examination: Examination) -> None:
    one = answers("scope", 16, 3, examination)
    again = Answers.from_line(one.to_line())
    np.testing.assert_array_equal(again.right, one.right)
    assert again.to_line() == one.to_line()


def test_a_table_has_a_column_for_each_checkpoint(examination: Examination) -> None:
    count = len(examination.types)
    rows = [
        answers("none", 576, 0, examination),
        answers("scope, coverage 0.8", 64, 4, examination),
    ]
    table = table_from_columns([Column("a", rows, examination), Column("b", rows, examination)])
    lines = table.splitlines()
    assert lines[0] == f"{count} questions about 2 pictures, float32."
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert lines[2].count("exact match") == 2
    assert "32.0, at most 64" in lines[-1]
    assert lines[-1].count(f"{(count - 4) / count:.1%}") == 4  # exact and kept, of both


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    questions = (POCKET / "test" / "questions.jsonl").read_text().splitlines()
    (data / "questions.jsonl").write_text("\n".join(q for q in questions if "00000.png" in q))
    (data / "00000.png").write_bytes((POCKET / "test" / "00000.png").read_bytes())
    monkeypatch.setattr(few_tokens, "_KEPT", tmp_path / "kept")
    column = few_tokens.measure_checkpoint(POCKET, data, ["scope", "random"], [8])
    assert [(one.reducer, one.tokens) for one in column.rows] == [
        ("none", 576),
        ("scope", 8),
        ("random", 8),
    ]
    assert column.rows[0].covered == 1.0 > column.rows[1].covered > 0
    assert column.rows[1].right.mean() > column.rows[2].right.mean()
    monkeypatch.setattr(few_tokens, "see_pictures", None)
    again = few_tokens.measure_checkpoint(POCKET, data, ["scope", "random"], [8])
    np.testing.assert_array_equal(again.rows[1].right, column.rows[1].right)
