"""Keep answers on disk while they come, and make one Parquet file of them at the end.

`answers.parquet.parts/` holds the answers of a run that is not complete: one file for each part of
a recording, one for each recording that was read to its end, and the settings of the run. Each is
written whole or not at all, and the file's name says what it holds, so a run that is started again
knows what there is. The answers' file is put in its place in one step.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from engines.errors import OptionError
from engines.publishing import partial_prefix
from engines.staging import staged_file
from runtime.labels.job import Recording
from runtime.labels.labelling import Ending, Label, Part

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1
_METADATA = b"foveate_label"
_PART = re.compile(r"(?P<key>[0-9a-f]{20})-(?P<number>\d{6,})-(?P<frames>\d+)\.parquet")


def import_pyarrow() -> Any:
    """Import pyarrow and its Parquet.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise OptionError(
            "Writing Parquet needs pyarrow, which is not installed. Run: pip install "
            "'foveate[label]'"
        ) from error
    return pyarrow


def schema_of_labels() -> pyarrow.Schema:
    """Return the columns, which are the fields of a `Label`."""
    pyarrow = import_pyarrow()
    types: dict[Any, Any] = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    types |= {bool: pyarrow.bool_(), str | None: pyarrow.string()}
    kinds = get_type_hints(Label)
    return pyarrow.schema(
        [
            pyarrow.field(name, types[kind], nullable=kind == str | None)
            for name, kind in kinds.items()
        ]
    )


class AnswersFile:
    """The answers of one run, finished or not."""

    def __init__(self, out: Path, settings: dict[str, Any], part_frames: int) -> None:
        """Name the place; nothing is read or written yet.

        Args:
            out: the Parquet file of all answers.
            settings: what a run must share to continue another.
            part_frames: frames of a full part.
        """
        self.out = out
        self.parts = out.with_name(f"{out.name}.parts")
        together = {"format": FORMAT, **settings}
        self._settings: dict[str, Any] = json.loads(json.dumps(together))  # as it is read again
        self._part_frames = part_frames

    def begin(self, recordings: list[Recording], *, overwrite: bool) -> dict[str, Any] | None:
        """Go on with what there is, or start.

        Args:
            recordings: of this run.
            overwrite: replace answers of other settings.

        Returns:
            The summary of a run with the same settings that is complete, if there is one.

        Raises:
            OptionError: there are answers of other settings, or the folder cannot be written.
        """
        if self.parts.exists():
            found = self._settings_of_parts()
            if found != self._settings:
                if not overwrite and len(list(self.parts.iterdir())) > 1:  # than its settings
                    raise self._refusal(self.parts, found)
                self._discard_parts()
        elif self.out.exists() and not overwrite:
            document = self._document_of_out()
            if document["settings"] != self._settings or document["keys"] != _keys(recordings):
                raise self._refusal(self.out, document["settings"])
            return dict(document["summary"])
        with staged_file(self.parts / "settings.json", OptionError) as staged:
            staged.write_text(json.dumps(self._settings), encoding="utf-8")
        return None

    def done(self, recording: Recording) -> set[int]:
        """Return the numbers of the parts that need not be done again."""
        return {
            number
            for number, frames, _ in self._parts_of(recording)
            if frames == self._part_frames or self.ending(recording) is not None
        }

    def ending(self, recording: Recording) -> Ending | None:
        """Return how a recording ended that was read to its end."""
        try:
            text = self._ending_path(recording).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return Ending(**json.loads(text))

    def keep(self, recording: Recording, part: Part) -> None:
        """Write a part; one that was cut short when the recording ended early is replaced.

        Raises:
            OptionError: the disk is full or may not be written.
        """
        import pyarrow.parquet

        name = f"{recording.key}-{part.number:06d}-{part.frames}.parquet"
        short = [path for number, _, path in self._parts_of(recording) if number == part.number]
        table = pyarrow.Table.from_pylist(
            [dataclasses.asdict(row) for row in part.rows], schema=schema_of_labels()
        )
        with staged_file(self.parts / name, OptionError) as staged:
            pyarrow.parquet.write_table(table, staged)
        for path in short:
            if path.name != name:
                path.unlink()

    def end(self, recording: Recording, ending: Ending) -> None:
        """Note how a recording ended; one that was not read to its end is read again next time."""
        if ending.complete:
            with staged_file(self._ending_path(recording), OptionError) as staged:
                staged.write_text(json.dumps(dataclasses.asdict(ending)), encoding="utf-8")

    def merge(self, endings: dict[Recording, Ending]) -> dict[str, Any]:
        """Put all answers into the one file, in the order of the recordings.

        Args:
            endings: how each recording of the run ended.

        Returns:
            What there is, as the JSON object that `--json` prints.
        """
        pyarrow = import_pyarrow()
        counts: dict[Recording, Counter[str]] = {}
        for recording in endings:
            counts[recording] = Counter()
            for _, _, path in self._parts_of(recording):
                columns = ["copied", "error", "finish", "visual_tokens"]
                counts[recording] += _counted(pyarrow.parquet.read_table(path, columns=columns))
        summary = _summary_of(self.out, endings, counts)
        document = {
            "settings": self._settings,
            "keys": _keys(list(endings)),
            "summary": summary,
        }
        text = json.dumps(document, ensure_ascii=False).encode("utf-8")
        schema = schema_of_labels().with_metadata({_METADATA: text})
        with (
            staged_file(self.out, OptionError) as staged,
            pyarrow.parquet.ParquetWriter(staged, schema) as writer,
        ):
            for recording in endings:
                for _, _, path in self._parts_of(recording):
                    table = pyarrow.parquet.read_table(path)
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
        if all(ending.complete for ending in endings.values()):
            self._discard_parts()
        return summary

    def _discard_parts(self) -> None:
        """Remove all parts or none: a process that dies here leaves no half of them.

        Under this name `sole_writer` removes what is left of them.
        """
        discarded = self.out.with_name(f"{partial_prefix(self.out)}finished")
        self.parts.rename(discarded)
        shutil.rmtree(discarded)

    def _parts_of(self, recording: Recording) -> list[tuple[int, int, Path]]:
        """Return the number, the frames and the file of each part, in order."""
        found = []
        for path in self.parts.glob(f"{recording.key}-*.parquet"):
            if match := _PART.fullmatch(path.name):
                found.append((int(match["number"]), int(match["frames"]), path))
        return sorted(found)

    def _ending_path(self, recording: Recording) -> Path:
        return self.parts / f"{recording.key}.json"

    def _settings_of_parts(self) -> dict[str, Any]:
        file = self.parts / "settings.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            if not any(self.parts.iterdir()):
                return self._settings
            raise OptionError(
                f"{self.parts} is in the way: it is not what a run of `foveate label` leaves. "
                "Choose another --out."
            ) from None
        except (ValueError, OSError) as error:
            raise OptionError(
                f"{file} cannot be read: {error}. Remove {self.parts} to start anew."
            ) from error

    def _document_of_out(self) -> dict[str, Any]:
        pyarrow = import_pyarrow()
        try:
            metadata = pyarrow.parquet.read_schema(self.out).metadata or {}
            return dict(json.loads(metadata[_METADATA]))
        except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
            raise OptionError(
                f"{self.out} is already there and holds no answers of `foveate label`. Choose "
                "another --out, or pass --overwrite to replace it."
            ) from error

    def _refusal(self, place: Path, found: dict[str, Any]) -> OptionError:
        names = sorted(
            name
            for name in {*self._settings, *found}
            if self._settings.get(name) != found.get(name)
        )
        what = ", ".join(names) or "the recordings' files"
        return OptionError(
            f"{place} holds answers of a run in which other {what} were given. Choose another "
            "--out, or pass --overwrite to replace them."
        )


def _keys(recordings: list[Recording]) -> list[str]:
    return [recording.key for recording in recordings]


def _counted(table: pyarrow.Table) -> Counter[str]:
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    failed = sum(error is not None for error in columns["error"])
    copied = sum(columns["copied"])
    return Counter(
        rows=table.num_rows,
        asked=table.num_rows - failed - copied,
        copied=copied,
        failed=failed,
        broken_form=columns["finish"].count("broken_form"),
        visual_tokens=sum(columns["visual_tokens"]),
    )


def _summary_of(
    out: Path, endings: dict[Recording, Ending], counts: dict[Recording, Counter[str]]
) -> dict[str, Any]:
    names = ("rows", "asked", "copied", "failed", "broken_form", "visual_tokens")
    total = sum(counts.values(), Counter())
    summary: dict[str, Any] = {
        "out": str(out),
        **{name: total[name] for name in names},
        "recordings": [
            {
                "recording": recording.name,
                **{name: counts[recording][name] for name in names},
                **dataclasses.asdict(ending),
            }
            for recording, ending in endings.items()
        ],
    }
    return summary
