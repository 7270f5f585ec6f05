"""What `runtime.label` is to do: its questions, which frames it asks about, its recordings."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.bundle import Bundle
from engines.errors import OptionError
from runtime.frames.source import FrameShape, SourceOptions
from runtime.language.generate import GenerationOptions
from runtime.model_options import ModelOptions

NOTICEABLE = 6.0
"""Grey levels by which the mean of a block must change to be new; video compression is below."""
LOCAL_CLUSTER = "local"
_DECISIVE = ("backend", "engine", "visual_tokens", "context_length", "llm_url", "llm_model")
"""Of the options of the model, those that may change an answer."""


@dataclass(frozen=True)
class LabelOptions(FrameShape):
    """Which frames are asked about.

    Attributes:
        every: ask about every n-th frame.
        every_seconds: ask about a frame whenever that much of the recording has passed; instead
            of ``every``.
        topic: of bags that have several.
        still: a frame in which no block of the picture differs by more than that many grey levels
            from the frame last asked about takes over its answer; 0 asks about each.
        part_frames: frames whose answers are written together. A run that was killed does so many
            again at most, and the first frame of a part is always asked about.
    """

    every: Annotated[
        int | None, typer.Option(min=1, help="Ask about every n-th frame; left out, about each.")
    ] = None
    every_seconds: Annotated[
        float | None,
        typer.Option(help="Ask about one frame in so many seconds of a recording, instead."),
    ] = None
    topic: Annotated[str | None, typer.Option(help="Topic of bags, by name or message type.")] = (
        None
    )
    still: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Grey levels: a frame that differs by less, block by block, from the frame last "
            "asked about takes over its answer; 0 asks about each.",
        ),
    ] = NOTICEABLE
    part_frames: Annotated[
        int,
        typer.Option(
            min=1,
            help="Frames whose answers are written together: a killed run does so many again at "
            "most.",
        ),
    ] = 64

    def problems(self) -> list[str]:
        """Return what cannot be served, a sentence each."""
        problems = super().problems()
        if self.every is not None and self.every_seconds is not None:
            problems.append("--every and --every-seconds were both given. Give one of them.")
        if self.every is not None and self.every < 1:
            problems.append(f"every is {self.every}, expected 1 or more frames.")
        if self.every_seconds is not None and not 0 < self.every_seconds < math.inf:
            problems.append(f"every_seconds is {self.every_seconds}, expected more than 0.")
        if not 0 <= self.still < math.inf:
            problems.append(f"still is {self.still}, expected 0 or more grey levels.")
        if self.part_frames < 1:
            problems.append(f"part_frames is {self.part_frames}, expected 1 or more.")
        return problems

    def source(self) -> SourceOptions:
        """Return how a recording is opened."""
        return SourceOptions(rotate=self.rotate, crop=self.crop, topic=self.topic)


@dataclass(frozen=True)
class ClusterOptions:
    """Which machines do the work.

    Attributes:
        ray: address of a Ray cluster; None works here.
        ray_cpus: processor cores of a worker; also its threads, unless they are given.
        ray_gpus: GPUs of a worker, or the share of one.
    """

    ray: Annotated[
        str | None,
        typer.Option(
            help="Spread the recordings over a Ray cluster: its address, auto for the one this "
            "machine belongs to, or local to start one here.",
        ),
    ] = None
    ray_cpus: Annotated[int, typer.Option(min=1, help="Processor cores of each Ray worker.")] = 1
    ray_gpus: Annotated[
        float, typer.Option(min=0.0, help="GPUs of each Ray worker, or the share of one.")
    ] = 0.0


@dataclass(frozen=True)
class LabelJob:
    """What is asked of every recording.

    Attributes:
        questions: asked about each frame, in this order.
        options: which frames are asked about.
        generation: how answers are written.
        system: instructions before a question.
    """

    questions: tuple[str, ...]
    options: LabelOptions = LabelOptions()
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.questions or not all(question.strip() for question in self.questions):
            raise OptionError('A question is empty. Ask one: --ask "Is a person in the way?"')
        if len(set(self.questions)) < len(self.questions):
            raise OptionError("A question was given twice. Ask each once.")

    def settings(
        self, bundle: Bundle, model: ModelOptions, recordings: list[Recording]
    ) -> dict[str, Any]:
        """Return what two runs must share to continue each other, as a JSON object."""
        manifest = bundle.manifest
        return {
            "recordings": [recording.name for recording in recordings],
            "questions": list(self.questions),
            "frames": dataclasses.asdict(self.options),
            "generation": dataclasses.asdict(self.generation),
            "system": self.system,
            "bundle": manifest.checksum or manifest.files[manifest.vision[0].file].sha256,
            **{name: getattr(model, name) for name in _DECISIVE},
            **({} if model.positions == "compact" else {"positions": model.positions}),
            **({} if model.visual_weights == "equal" else {"visual_weights": model.visual_weights}),
        }


@dataclass(frozen=True)
class Recording:
    """A file or a folder that is labelled.

    Attributes:
        name: its path as it was given.
        key: changes with its place, its size and its date.
    """

    name: str
    key: str


def find_recordings(paths: list[str]) -> list[Recording]:
    """Identify recordings before anything is read of them.

    Raises:
        OptionError: one of them is not a file or a folder, or was given twice.
    """
    absent = [path for path in paths if not (Path(path).is_file() or Path(path).is_dir())]
    if absent:
        raise OptionError(
            f"{', '.join(absent[:5])}: expected the file or folder of a recording. Cameras are "
            "watched with `foveate watch`."
        )
    places = [Path(path).resolve() for path in paths]
    twice = sorted({str(place) for place in places if places.count(place) > 1})
    if twice or not paths:
        raise OptionError(f"{', '.join(twice) or 'Nothing'} was given. Give each recording once.")
    return [Recording(path, _key_of(place)) for path, place in zip(paths, places, strict=True)]


def _key_of(place: Path) -> str:
    files = (
        sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
    )
    lines = [str(place)]
    for file in files:
        status = file.stat()
        lines.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:20]
