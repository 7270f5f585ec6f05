"""Print a verification in the terminal: candidates, stages, the worst pictures, verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.verify.report import CandidateReport, VerifyReport, find_worst, rank_worst


def print_report(report: VerifyReport, worst: int) -> None:
    """Print a report on stdout.

    Args:
        report: what was found.
        worst: how many pictures to show.
    """
    console = Console()
    console.print(_candidates_table(report))
    console.print(_stages_table(report.candidates))
    console.print(_pictures_table(report, worst))
    for line in verdicts(report):
        print(line)


def verdicts(report: VerifyReport) -> Iterator[str]:
    """Yield the verdict on each candidate, in sentences."""
    for one in report.candidates:
        for picture in one.pictures:
            if picture.answer is not None and not picture.answer.equal:
                yield f"{one.name}, {picture.file}: PyTorch answers {picture.answer.reference!r}"
                yield f"{one.name}, {picture.file}: the bundle says {picture.answer.bundle!r}"
    for one in report.candidates:
        if one.passed:
            yield f"{one.name} agrees with {report.model} within tolerance."
        else:
            yield f"{one.name} differs from {report.model}: {'; '.join(one.failures)}.{_where(one)}"


def _where(candidate: CandidateReport) -> str:
    if candidate.first_divergence is None:
        return ""
    stage = next(s for s in candidate.stages if s.stage == candidate.first_divergence)
    told = f" First past its limit: {stage.stage} ({stage.worst:.2g}, limit {stage.limit:.2g})."
    if candidate.largest_growth not in (None, candidate.first_divergence):
        told += f" Most error comes in at: {candidate.largest_growth}."
    return told


def _candidates_table(report: VerifyReport) -> Table:
    answered = report.question is not None
    count = len(report.candidates[0].pictures)
    title = f"{escape(report.model)} in PyTorch is the reference; {count} pictures, at their worst"
    table = Table(box=SIMPLE, padding=(0, 1), pad_edge=False, title=title, title_justify="left")
    table.add_column("bundle", overflow="fold")
    columns = ["", "patches", "merged", "cosine", "relative"]
    columns += ["logits", "answers"] if answered else []
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for one in report.candidates:
        worst = one.summary
        row = [escape(one.name), one.precision["vision"]]
        row += [f"{worst['overlap']:.1%}", f"{worst['assignment']:.1%}"]
        row += [f"{worst['cosine']:.5f}", f"{worst['relative']:.1e}"]
        if answered:
            row += [f"{worst['logits_cosine']:.5f}", f"{worst['equal_answers']:.0%}"]
        table.add_row(*row)
    return table


def _stages_table(candidates: Sequence[CandidateReport]) -> Table:
    """One row per stage, one column per candidate: the worst error, with its limit when past."""
    table = Table(box=SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("error of stage", no_wrap=True)
    for one in candidates:
        table.add_column(escape(one.name), justify="right", overflow="fold")
    names = dict.fromkeys(stage.stage for one in candidates for stage in one.stages)
    most = max(candidates, key=lambda one: len(one.stages))
    order = [stage.stage for stage in most.stages]
    for name in sorted(names, key=lambda name: order.index(name) if name in order else len(order)):
        row = [name]
        for one in candidates:
            stage = next((stage for stage in one.stages if stage.stage == name), None)
            if stage is None:
                row.append("")
                continue
            past = f" > {stage.limit:.0e}" if stage.diverged else ""
            row.append(f"{stage.worst:.1e}{past}")
        table.add_row(*row)
    return table


def _pictures_table(report: VerifyReport, worst: int) -> Table:
    """One row for each of the worst pictures, of the candidate that did worst on it."""
    answered = report.question is not None
    table = Table(box=SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("worst pictures", overflow="fold")
    columns = ["bundle", "tokens", "patches", "merged", "cosine"]
    columns += ["logits", "answer"] if answered else []
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for file in rank_worst(report.candidates, worst):
        one = report.candidates[find_worst(report.candidates, file)]
        picture = next(row for row in one.pictures if row.file == file)
        seen = picture.visual_tokens
        row = [escape(file), escape(one.name), str(picture.tokens[1])]
        row += [f"{seen.overlap:.1%}", f"{seen.assignment:.1%}", f"{seen.cosine:.5f}"]
        if picture.answer is not None:
            row += [f"{picture.answer.logits_cosine:.5f}"]
            row += ["equal" if picture.answer.equal else "differs"]
        table.add_row(*row)
    return table
