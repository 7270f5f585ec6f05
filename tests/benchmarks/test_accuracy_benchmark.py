"""The accuracy benchmark: its arithmetic, and that it judges answers as the card's script does."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.accuracy import BUDGETS, PRECISIONS, REDUCERS, Setting, list_settings
from benchmarks.accuracy_report import (
    Result,
    budgets_from_results,
    chart_from_results,
    measure_loss,
    replace_between,
    summarize,
    table_from_results,
)
from benchmarks.packed_answers import POCKET, Examination
from export.checkpoint.accuracy_table import ACCURACY_FILE, AccuracyTable
from export.checkpoint.llava import open_checkpoint

import evaluate  # isort: skip - found by packed_answers


@pytest.fixture(scope="module")
def examination() -> Examination:
    return Examination(POCKET, POCKET / "test", pictures=4)


def results(examination: Examination) -> list[Result]:
    """Made-up answers: INT8 misses two questions that float32 gets right."""
    count = len(examination.types)
    rng = np.random.default_rng(0)
    made = []
    for reducer, tokens in (("none", 576), ("visionzip", 64), ("visionzip", 32)):
        right = rng.random(count) < 0.8
        worse = right.copy()
        worse[np.flatnonzero(right)[:2]] = False
        made.append(Result(reducer, tokens, "fp32", float(tokens), right, "0" * 64, 1.0))
        made.append(Result(reducer, tokens, "int8", float(tokens), worse, "1" * 64, 1.0))
    return made


def test_every_cell_is_measured() -> None:
    settings = list_settings(576, BUDGETS, list(REDUCERS), PRECISIONS)
    assert len(settings) == len(set(settings)) == 3 * (1 + 6 * 10)
    assert {one.reducer for one in settings} == {"none", *REDUCERS}


def test_verdicts_are_those_of_the_card(examination: Examination) -> None:
    """The same pictures through `evaluate.py`'s tower and projector, half of them shown wrongly."""
    model, processor = evaluate.load_checkpoint(POCKET)
    held_out = evaluate.HeldOut(examination.pictures, examination.questions)
    seen = evaluate.see_pictures(model, processor, examination.pictures)
    for wrong in (False, True):
        theirs = evaluate.judge(model, seen, held_out, wrong_image=wrong)
        with torch.no_grad():
            tokens = model.model.multi_modal_projector(seen.features[:, 1:])
        tokens = tokens.roll(-1 if wrong else 0, 0).numpy()
        ours = examination.right_answers(tokens, np.full(len(tokens), 576))
        np.testing.assert_array_equal(ours, theirs)
        assert ours.mean() > 0.8 if not wrong else ours.mean() < 0.6
    # What stands beyond the valid count changes nothing.
    tokens = tokens[:, :40]
    short = examination.right_answers(tokens[:, :30], np.full(len(tokens), 30))
    noisy = tokens.copy()
    noisy[:, 30:] = 50.0
    np.testing.assert_array_equal(examination.right_answers(noisy, np.full(len(tokens), 30)), short)


def test_a_result_survives_its_file(examination: Examination) -> None:
    for one in results(examination):
        again = Result.from_json(json.loads(json.dumps(one.to_json())))
        np.testing.assert_array_equal(again.right, one.right)
        assert again.to_json() == one.to_json()


def test_losses_are_in_points_of_the_same_questions(examination: Examination) -> None:
    made = results(examination)
    count = len(examination.types)
    loss = measure_loss(made[0], made[1], examination.picture_of)
    assert loss.points == pytest.approx(200 / count)
    assert loss.low <= loss.points <= loss.high
    summary = summarize(made, examination)
    assert summary["largest_loss_points"] == {"int8": pytest.approx(200 / count, abs=0.01)}
    assert not summary["met"]
    assert summarize(made[::2], examination)["met"]


def test_a_bundle_can_say_what_each_budget_costs(examination: Examination, tmp_path: Path) -> None:
    made = results(examination)
    (tmp_path / ACCURACY_FILE).write_text(budgets_from_results(made, examination))
    table = AccuracyTable(tmp_path)
    for one in made:
        reducer = Setting(one.reducer, one.tokens, one.precision).make_reducer(
            open_checkpoint(POCKET)
        )
        assert table.accuracy_of(reducer, 576, one.precision) == round(one.exact, 4)
    told = json.loads((tmp_path / ACCURACY_FILE).read_text())
    assert told["pictures"] == 4
    assert told["reducers"]["none"]["fp32"]["576"]["points_lost"] == 0


def test_the_page_gets_tables_and_a_chart(examination: Examination, tmp_path: Path) -> None:
    made = results(examination)
    table = table_from_results(made, examination).splitlines()
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1
    ElementTree.fromstring(chart_from_results(made))
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- m: begin -->\nold\n<!-- m: end -->\nbelow\n")
    replace_between(page, "m", "new")
    assert page.read_text() == "above\n<!-- m: begin -->\nnew\n<!-- m: end -->\nbelow\n"
    with pytest.raises(ValueError, match="lacks"):
        replace_between(page, "other", "new")


def test_what_is_kept_is_what_the_card_says() -> None:
    kept = json.loads((POCKET / ACCURACY_FILE).read_text())
    assert kept["questions"] == 2527
    assert set(kept["reducers"]) == {"none", *REDUCERS}
    for name in REDUCERS:
        assert set(kept["reducers"][name]["fp32"]) == {str(budget) for budget in BUDGETS}
    card = json.loads((POCKET / "accuracy.json").read_text())
    low, high = kept["reducers"]["none"]["fp32"]["576"]["interval"]
    assert low <= card["all"]["exact"] <= high
