"""Ask about every n-th frame of recordings, into a Parquet file: `python -m runtime.label`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines.cli import JsonOption, print_json
from engines.errors import OptionError
from engines.progress_bar import Progress, show_progress
from runtime.labels.job import ClusterOptions, LabelJob, LabelOptions
from runtime.language.generate import GenerationOptions
from runtime.model_options import ModelOptions, SystemOption

if TYPE_CHECKING:
    from runtime.labels.answers_file import AnswersFile
    from runtime.labels.job import Recording
    from runtime.labels.labelling import Ending

EXAMPLES = (
    'python -m runtime.label build/pocket log.mcap --ask "Is a person in the way?" '
    "--every-seconds 1 --out answers.parquet",
    'python -m runtime.label build/pocket day/*.mp4 --ask "Is the door open?" --choices yes,no '
    "--every 30 --out doors.parquet --json",
)
SHORT_ANSWERS = GenerationOptions(max_tokens=64)
EVERY_FRAME = LabelOptions()
HERE = ClusterOptions()


def label(
    bundle: str | Path,
    recordings: Sequence[str | Path],
    questions: str | Sequence[str],
    out: str | Path,
    *,
    options: LabelOptions = EVERY_FRAME,
    model: ModelOptions = ModelOptions(),
    generation: GenerationOptions = SHORT_ANSWERS,
    system: str | None = None,
    overwrite: bool = False,
    cluster: ClusterOptions = HERE,
    progress: Progress = lambda line, done: None,
) -> dict[str, Any]:
    """Answer about frames of recordings; a run that was stopped goes on where it was.

    Args:
        bundle: the bundle's directory.
        recordings: videos, bags, MCAP files, pictures or folders of pictures.
        questions: what is asked about each frame.
        out: the Parquet file that is written; its columns are the fields of
            `runtime.labels.labelling.Label`.
        options: which frames are asked about.
        model: how the bundle is loaded.
        generation: how answers are written.
        system: instructions before each question.
        overwrite: replace the answers of another run.
        cluster: which machines do the work.
        progress: told how far it is.

    Returns:
        How many rows there are and what became of each recording, as `--json` prints it.

    Raises:
        FoveateError: anything the user can fix, but for what cannot be read of a recording.
    """
    from engines.bundle import open_bundle
    from runtime.labels.answers_file import AnswersFile, import_pyarrow
    from runtime.labels.job import find_recordings

    started = time.perf_counter()
    import_pyarrow()
    job = LabelJob(
        (questions,) if isinstance(questions, str) else tuple(questions),
        options,
        generation,
        system,
    )
    found = find_recordings([str(recording) for recording in recordings])
    settings = job.settings(open_bundle(bundle, verify=False), model, found)
    answers = AnswersFile(Path(out).resolve(), settings, options.part_frames)
    with _writing_to(answers.out):
        summary = answers.begin(found, overwrite=overwrite)
        if summary is None:
            if cluster.ray is None:
                endings = _label_here(bundle, found, job, model, answers, progress)
            else:
                from runtime.labels.cluster import label_on_cluster

                endings = label_on_cluster(bundle, found, job, model, answers, cluster, progress)
            summary = answers.merge(endings)
    return {**summary, "seconds": round(time.perf_counter() - started, 3)}


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    """Keep others from writing to a file.

    Raises:
        OptionError: another process does, or its folder cannot be written.
    """
    from engines.publishing import sole_writer

    with ExitStack() as held:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(sole_writer(out, OptionError))
        except OSError as refusal:
            raise OptionError(
                f"{out} cannot be written: {refusal}. Choose a folder you may write to."
            ) from refusal
        yield


def _label_here(
    bundle: str | Path,
    recordings: list[Recording],
    job: LabelJob,
    options: ModelOptions,
    answers: AnswersFile,
    progress: Progress,
) -> dict[Recording, Ending]:
    """Do what is not done, and return how each recording ended."""
    from runtime.labels.labelling import Ending, label_recording

    endings = {each: ending for each in recordings if (ending := answers.ending(each)) is not None}
    left = [at for at, recording in enumerate(recordings) if recording not in endings]
    if not left:
        return endings
    with options.open(bundle) as model:
        for at in left:
            recording = recordings[at]

            def tell(name: str, share: float, at: int = at) -> None:
                progress(f"{at + 1} of {len(recordings)}: {name}", (at + share) / len(recordings))

            done = answers.done(recording)
            for piece in label_recording(model, recording, job, done, tell):
                if isinstance(piece, Ending):
                    endings[recording] = piece
                    answers.end(recording, piece)
                else:
                    answers.keep(recording, piece)
    return {recording: endings[recording] for recording in recordings}


def main(
    bundle: Annotated[Path, typer.Argument(help="Directory that `export.build` wrote.")],
    recordings: Annotated[
        list[str],
        typer.Argument(help="Videos, bags, MCAP files, pictures or folders of pictures."),
    ],
    *,
    ask: Annotated[
        list[str], typer.Option(help="What to ask about each frame; may be given again.")
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the answers of another run.")
    ] = False,
    system: SystemOption = None,
    json_output: JsonOption = False,
    view: LabelOptions,
    cluster: ClusterOptions,
    model: ModelOptions,
    generation: GenerationOptions = SHORT_ANSWERS,
) -> int:
    """Ask about every n-th frame of recordings, and write the answers into a Parquet file.

    The same command again goes on where a killed run stopped, and answers what is there already
    are kept. A frame in which nothing has changed takes over the answer of the frame before it.

    A recording that cannot be read, or not to its end, does not stop the others: it is told on
    stderr, its answers so far are in the file, the exit code is 1, and the same command tries it
    again.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    with show_progress() as progress:
        summary = label(
            bundle,
            recordings,
            ask,
            out,
            options=view,
            model=model,
            generation=generation,
            system=system,
            overwrite=overwrite,
            cluster=cluster,
            progress=progress,
        )
    if json_output:
        print_json(summary)
    else:
        print(
            f"{summary['out']}: {summary['rows']} rows, {summary['asked']} asked, "
            f"{summary['copied']} copied from the frame before, {summary['failed']} not readable"
        )
    return _tell_problems(summary)


def _tell_problems(summary: dict[str, Any]) -> int:
    """Name on stderr what could not be read; return the exit code."""
    code = 0
    for recording in summary["recordings"]:
        if recording["complete"] and not recording["problems"]:
            continue
        code = 1
        counts = ", ".join(f"{count} x {reason}" for reason, count in recording["problems"].items())
        end = "" if recording["complete"] else " It was not read to its end."
        print(
            f"{recording['recording']}: {counts}.{end} {recording['last_problem']}",
            file=sys.stderr,
        )
    return code
