"""The benchmark of shared budgets: what each row leaves of pictures, and its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import shared_budget
from benchmarks.shared_budget import ONEVISION, REDUCERS, Row, equal_shares, list_rows
from engines.errors import OptionError

_WRITE = """
import sys
from pathlib import Path
from onevision import build_model
from onevision_checkpoint import write_checkpoint
from pictures import write_pictures
root = Path(sys.argv[1])
write_checkpoint(build_model(0), root / "checkpoint")
write_pictures(7, 2, root / "pictures")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights and two pictures with questions."""
    root = tmp_path_factory.mktemp("onevision")
    subprocess.run([sys.executable, "-c", _WRITE, str(root)], cwd=ONEVISION, check=True)
    return root


def test_shares_are_even_and_the_first_squares_take_the_rest() -> None:
    assert equal_shares(82, [5]).tolist() == [17, 17, 16, 16, 16]
    assert equal_shares(16, [5, 3]).tolist() == [4, 3, 3, 3, 3, 6, 5, 5]
    with pytest.raises(OptionError, match="4 tokens cannot be shared evenly by 5 squares"):
        equal_shares(4, [5])


def test_what_weighs_is_measured_both_ways() -> None:
    rows = list_rows([16])
    assert rows[0] == Row("none", 0, shared=False)
    assert {row.reducer for row in rows if row.shared} == {
        *("scope", "scope, alpha 0", "divprune", "top_attention")
    }
    assert {row.reducer for row in rows[1:] if not row.shared} == set(REDUCERS)


def test_every_row_is_answered(written: Path) -> None:
    asked = ["--data", str(written / "pictures"), "--model", str(written / "checkpoint")]
    ran = CliRunner().invoke(
        shared_budget.app, [*asked, "--tokens", "32,16", "--newlines", "none", "--json"]
    )
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    rows = {(row["reducer"], row["budget"], row["shared"]): row for row in report["rows"]}
    assert len(rows) == 1 + 2 * (len(REDUCERS) + 4)
    assert rows["none", None, False]["tokens_used"] == 744
    for (name, budget, _), row in rows.items():
        assert row["tokens_used"] == (budget or 744), name
        assert 0 <= row["interval"][0] + 1e-6 <= row["exact"] + 1e-6 <= row["interval"][1] + 1e-6
    assert rows["random, seed 0", 16, False]["of_whole_view"] == 4
    even = {32: 7, 16: 4}
    shared = [row for row in report["rows"] if row["shared"]]
    assert any(row["of_whole_view"] != even[row["budget"]] for row in shared)
    assert [one["budget"] for one in report["shared_minus_square"]] == [32] * 4 + [16] * 4
    told = shared_budget.tables_from(report)
    assert "| 16 | scope | the picture | 16.0 |" in told
    assert np.isfinite([one["difference"] for one in report["shared_minus_square"]]).all()
