"""Progress as lines: for each new thing, and every few seconds while it lasts."""

from __future__ import annotations

import io

from engines.progress_bar import ProgressLines, show_progress


def test_lines_come_for_each_thing_and_every_few_seconds() -> None:
    now = 0.0
    stream = io.StringIO()
    tell = ProgressLines(stream, clock=lambda: now)
    tell("Vision graph: 64 of 576", 0.0)
    for second in range(70):
        now = float(second)
        tell(f"Language model: {second / 10} of 7.0 GB", second / 100)
    tell("Done", 1.0)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  0:00   0%  Vision graph: 64 of 576"
    assert lines[1] == "  0:00   0%  Language model: 0.0 of 7.0 GB"
    assert lines[2] == "  0:05   5%  Language model: 0.5 of 7.0 GB"
    assert lines[-2] == "  1:05  65%  Language model: 6.5 of 7.0 GB"
    assert lines[-1] == "  1:09 100%  Done"
    assert len(lines) == 1 + 14 + 1


def test_without_a_screen_there_are_lines(capsys) -> None:
    with show_progress() as tell:
        tell("Reading", 0.25)
    assert capsys.readouterr().err == "  0:00  25%  Reading\n"
