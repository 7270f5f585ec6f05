"""Answer about the frames of one recording, part by part.

A part is a fixed number of chosen frames. What its answers are depends on nothing outside it, so a
run that goes on after a part gives what a run that was never stopped gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from engines.errors import PictureError, SourceError
from runtime.camera.scene_change import Blocks, block_means, largest_change
from runtime.frames import Frame, FrameSource, open_source
from runtime.frames.source import UndecodedFrame
from runtime.labels.job import LabelJob, LabelOptions, Recording
from runtime.model import Answer, Model

Tell = Callable[[str, float], None]
"""Called with a recording's name and the share of it that was read, 0 to 1."""


@dataclass(frozen=True)
class Label:
    """One row: a question about a frame, and its answer.

    Attributes:
        recording: the recording's path as it was given.
        source: what was read of it: the path, and of a bag the topic.
        frame: which frame of the source it is, from 0.
        timestamp_ns: nanoseconds; since 1970 in bags, since the start in videos and folders.
        question: the words.
        answer: None where the frame could not be read.
        finish: why the answer ended; None without an answer.
        visual_tokens: visual tokens computed for this row; 0 where the answer was copied.
        prompt_tokens: positions of the prompt, visual tokens included; 0 where copied.
        answer_tokens: tokens written; 0 where copied.
        milliseconds: from the picture to the whole answer; 0 where copied.
        copied: whether the answer is that of the frame before, as nothing had changed.
        error: why there is no answer.
    """

    recording: str
    source: str
    frame: int
    timestamp_ns: int
    question: str
    answer: str | None
    finish: str | None = None
    visual_tokens: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    milliseconds: float = 0.0
    copied: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Part:
    """The rows of a fixed number of frames that follow each other.

    Attributes:
        number: which part of the recording it is, from 0.
        frames: how many frames it has; fewer than `LabelOptions.part_frames` only at the end.
        rows: one for each frame and question.
        share: how much of the recording was read with it, 0 to 1.
    """

    number: int
    frames: int
    rows: tuple[Label, ...]
    share: float


@dataclass(frozen=True)
class Ending:
    """How the reading of a recording ended.

    Attributes:
        frames: frames the recording gave, chosen or not.
        complete: whether it was read to its end.
        problems: what could not be read: reason -> how often.
        last_problem: the latest of them in words.
    """

    frames: int
    complete: bool
    problems: dict[str, int] = field(default_factory=dict)
    last_problem: str = ""


class FrameChoice:
    """Chooses the frames that are asked about, in one pass over a recording."""

    def __init__(self, options: LabelOptions) -> None:
        seconds = options.every_seconds
        self._period_ns = None if seconds is None else max(round(seconds * 1e9), 1)
        self._every = options.every or 1
        self._start_ns: int | None = None
        self._period: int | None = None

    def wants(self, frame: UndecodedFrame) -> bool:
        """Say whether the frame is asked about."""
        if self._period_ns is None:
            return frame.index % self._every == 0
        if self._start_ns is None:
            self._start_ns = frame.timestamp_ns
        # The first frame of each period, however the frames lie in it; one without frames has none.
        before, self._period = (
            self._period,
            (frame.timestamp_ns - self._start_ns) // self._period_ns,
        )
        return self._period != before


def label_recording(
    model: Model,
    recording: Recording,
    job: LabelJob,
    done: Collection[int] = (),
    tell: Tell = lambda name, share: None,
) -> Iterator[Part | Ending]:
    """Yield the parts of a recording that are not done, and last how it ended.

    Args:
        model: an opened bundle.
        recording: what to read.
        job: what to ask.
        done: numbers of parts that exist; their pictures are not decoded.
        tell: called before each frame.

    Raises:
        FoveateError: the model failed; what cannot be read of the recording is in the `Ending`.
    """
    try:
        opened = open_source(recording.name, job.options.source())
    except SourceError as error:
        yield Ending(0, complete=False, problems={"not opened": 1}, last_problem=str(error))
        return
    with opened as source:
        ask = _PartInTheMaking(model, recording, job, source)
        choice = FrameChoice(job.options)
        chosen = read = 0
        for frame in source.undecoded():
            read = frame.index + 1
            if not choice.wants(frame):
                continue
            number, at = divmod(chosen, job.options.part_frames)
            chosen += 1
            if number in done:
                continue
            share = min(read / source.length, 1.0) if source.length else 0.0
            tell(recording.name, share)
            ask.about(frame)
            if at == job.options.part_frames - 1:
                yield ask.finish(number, share)
        if ask.frames:
            yield ask.finish(chosen // job.options.part_frames, 1.0)
        errors = source.errors
        complete = source.failure is None and "read failed" not in errors.counts
        yield Ending(read, complete, dict(errors.counts), errors.last)


class _PartInTheMaking:
    """Asks about the frames of a part, and takes over answers where nothing has changed."""

    def __init__(
        self, model: Model, recording: Recording, job: LabelJob, source: FrameSource
    ) -> None:
        self.frames = 0
        self._model, self._recording, self._job, self._source = model, recording, job, source
        self._rows: list[Label] = []
        self._reference: Blocks | None = None
        self._answers: list[Answer] = []

    def about(self, pending: UndecodedFrame) -> None:
        """Add the rows of one frame."""
        self.frames += 1
        frame = pending.decode()
        problem = self._source.errors.last if frame is None else None
        copied = False
        if frame is not None:
            try:
                copied = not self._ask_if_changed(frame)
            except PictureError as error:
                problem = str(error)
        for at, question in enumerate(self._job.questions):
            place = (self._recording.name, self._source.name, pending.index, pending.timestamp_ns)
            if problem is not None:
                self._rows.append(Label(*place, question, None, error=problem))
            else:
                self._rows.append(_row(place, question, self._answers[at], copied))

    def finish(self, number: int, share: float) -> Part:
        """Return the part and begin the next one, which knows nothing of it."""
        part = Part(number, self.frames, tuple(self._rows), share)
        self.frames, self._rows, self._reference, self._answers = 0, [], None, []
        return part

    def _ask_if_changed(self, frame: Frame) -> bool:
        blocks = block_means(frame.image)
        still = self._job.options.still
        if (
            still
            and self._reference is not None
            and largest_change(blocks, self._reference) <= still
        ):
            return False
        job = self._job
        visual = self._model.encoder.encode([frame.image])
        self._answers = [
            self._model.answer_about([visual], question, job.generation, system=job.system)
            for question in job.questions
        ]
        self._reference = blocks
        return True


def _row(place: tuple[str, str, int, int], question: str, answer: Answer, copied: bool) -> Label:
    if copied:
        return Label(*place, question, answer.text, answer.finish, copied=True)
    return Label(
        *place,
        question,
        answer.text,
        answer.finish,
        visual_tokens=answer.visual_tokens,
        prompt_tokens=answer.prompt_tokens,
        answer_tokens=len(answer.token_ids),
        milliseconds=answer.milliseconds["total"],
    )
