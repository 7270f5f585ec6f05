"""Watch a camera and answer about what it sees, again and again.

Enters: a bundle, a source of frames and a question. Leaves: one JSON line on stdout per answer,
with the age of the frame it is about; progress and warnings go to stderr.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines.cli import run
from engines.errors import FoveateError, OptionError
from runtime.answer_options import AnswerOptions, SystemOption
from runtime.model_options import ModelOptions

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from runtime.camera import CameraLoop, CameraOptions
    from runtime.camera_parts import Answerer, CameraAnswer, Encoder, Stall
    from runtime.frames import FrameSource, SourceOptions
    from runtime.generate import GenerationOptions
    from runtime.recording import Recording

EXAMPLES = (
    'python -m runtime.watch build/pocket /dev/video0 --ask "Is a person in the way?"',
    'python -m runtime.watch build/pocket csi:0 --ask "What is ahead?" --every 1.0 --rotate 180',
    'python -m runtime.watch build/pocket clip.mp4 --ask "What is shown?" --every-frame --fps 2',
    'python -m runtime.watch build/pocket log.mcap --topic /front --ask "Is the door open?"',
    'python -m runtime.watch build/pocket rtsp://camera/live --ask "Who is there?" --on-change',
)

SHORT_ANSWERS = AnswerOptions(max_tokens=64)


@dataclass(frozen=True)
class WatchOptions:
    """How to watch.

    Attributes:
        camera: the question and when it is answered.
        source: how frames are looked at.
        generation: how answers are written; None writes 64 tokens at most.
        model: how the bundle is loaded.
        system: instructions before the question.
        latency_target_ms: choose among the bundle's budgets so that the first token is there in
            that time; None keeps to one graph.
        metrics_port: serve Prometheus text there, on the loopback interface.
        status: keep a line on stderr that says how it goes.
        record: folder that keeps frames, overlays and answers.
        answers: end after that many.
    """

    camera: CameraOptions
    source: SourceOptions
    generation: GenerationOptions | None = None
    model: ModelOptions = field(default_factory=ModelOptions)
    system: str | None = None
    latency_target_ms: float | None = None
    metrics_port: int | None = None
    status: bool = False
    record: Path | None = None
    answers: int | None = None


def watch(
    bundle: str | Path,
    source: str | FrameSource,
    options: WatchOptions,
    show: Callable[[dict[str, Any]], None],
    control: Iterable[str] | None = None,
) -> None:
    """Watch a source until it ends or the process is told to stop.

    Args:
        bundle: the bundle's directory.
        source: what to watch; see `runtime.frames.opening.KINDS`. A source that is open already is
            closed at the end, and `options.source` does not apply to it.
        options: how to watch.
        show: called with each answer, stall and, last, the summary.
        control: lines that steer the loop while it runs: ``ask QUESTION``, ``pause``, ``resume``
            and ``stop``.

    Raises:
        FoveateError: anything the user can mend.
    """
    from runtime.answering import FrameAnswerer, FrameEncoder
    from runtime.camera import CameraLoop
    from runtime.camera_parts import CameraAnswer
    from runtime.frames import open_source
    from runtime.recording import Recording

    if isinstance(source, str):
        view = options.source
        source = open_source(
            source, rotate=view.rotate, crop=view.crop, fps=view.fps, topic=view.topic
        )
    with ExitStack() as open_things:
        frames = open_things.enter_context(source)
        # Left to the garbage collector: a backend that hangs may still be inside it at the end.
        model = options.model.open(bundle)
        recording = Recording(options.record, model.bundle) if options.record else None
        if recording is not None:
            open_things.callback(recording.close)
        encoder: Encoder = FrameEncoder(model.encoder)
        answerer: Answerer = FrameAnswerer(model, options.generation, options.system)
        if options.latency_target_ms is not None:
            target_ms = options.latency_target_ms
            encoder, answerer = _budgeted(model.bundle, answerer, options, target_ms)
        loop = CameraLoop(frames, encoder, answerer, options.camera)
        observers = _observers(loop, options, open_things)
        if control is not None:
            threading.Thread(target=_obey, args=(control, loop), daemon=True).start()
        given = 0
        with _stopping_on_signals(loop), closing(loop.answers()) as items:
            for item in items:
                if not isinstance(item, CameraAnswer):
                    show(document_from_stall(item))
                    continue
                document = document_from_answer(item)
                show(document)
                for observe in observers:
                    observe(item)
                if recording is not None and not item.reused:
                    recording.keep(item, document)
                given += 1
                if given == options.answers:
                    break
        if recording is not None:
            recording.close()
        show(summary_of(loop, given, recording))


def _budgeted(
    bundle: Bundle, answerer: Answerer, options: WatchOptions, target_ms: float
) -> tuple[Encoder, Answerer]:
    """Put a budget controller between the loop and the bundle's graphs."""
    from runtime.budget import BudgetedEncoder, ObservedAnswerer

    if options.model.visual_tokens is not None:
        raise OptionError(
            "--visual-tokens fixes the budget and --latency-target chooses it. Leave one out."
        )
    encoder = BudgetedEncoder(bundle, options.model.threads)
    controller = encoder.calibrate(answerer, options.camera.question, target_ms)
    return encoder, ObservedAnswerer(answerer, controller)


def _observers(
    loop: CameraLoop, options: WatchOptions, open_things: ExitStack
) -> list[Callable[[CameraAnswer], None]]:
    """Open what is to be told of every answer besides the caller."""
    from runtime.metrics import MetricsServer, StatusLine

    observers: list[Callable[[CameraAnswer], None]] = []
    if options.metrics_port is not None:
        server = MetricsServer(loop, options.metrics_port)
        open_things.callback(server.close)
        observers.append(server.observe)
    if options.status:
        observers.append(open_things.enter_context(StatusLine(loop)).show)
    return observers


def document_from_answer(answer: CameraAnswer) -> dict[str, Any]:
    """Return an answer as the JSON object of its line."""
    seen, said = answer.seen, answer.said
    frame = seen.arrival.frame
    spent = {} if answer.reused else {"prefill": said.prefill_ms, "decode": said.decode_ms}
    encode = {} if seen.kept else seen.visual.milliseconds
    return {
        "event": "answer",
        "answer": said.text,
        "question": answer.question,
        "source": frame.source,
        "frame": seen.arrival.index,
        "timestamp_ns": frame.timestamp_ns,
        "age_ms": round(answer.age_ms, 3),
        "milliseconds": {stage: round(ms, 3) for stage, ms in (encode | spent).items()},
        "visual_tokens": int(seen.visual.valid[0]),
        "prompt_tokens": said.prompt_tokens,
        "answer_tokens": len(said.token_ids),
        "finish": said.finish,
        "reused": answer.reused,
    }


def document_from_stall(stall: Stall) -> dict[str, Any]:
    """Return a stall as the JSON object of its line."""
    return {"event": "stall", "seconds": round(stall.seconds, 1)}


def summary_of(loop: CameraLoop, answers: int, recording: Recording | None) -> dict[str, Any]:
    """Return what became of every frame, as the last JSON line."""
    summary: dict[str, Any] = {
        "event": "end",
        "frames": loop.frames,
        "answers": answers,
        "drops": dict(loop.drops),
        "errors": dict(loop.source.errors.counts),
    }
    if recording is not None:
        summary |= {"recorded": recording.written, "not_recorded": dict(recording.drops)}
    return summary


def _obey(control: Iterable[str], loop: CameraLoop) -> None:
    """Carry out what is written on the control lines, until they end."""
    for line in control:
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "ask":
                loop.ask(rest)
            elif word in ("pause", "resume", "stop") and not rest:
                getattr(loop, word)()
            elif word:
                raise OptionError(
                    f"{line.strip()!r} is not a command, expected ask QUESTION, pause, resume or "
                    "stop."
                )
        except FoveateError as error:
            print(f"control: {error}", file=sys.stderr)


@contextmanager
def _stopping_on_signals(loop: CameraLoop) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the loop in order; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in held:
            signal.signal(each, signal.SIG_DFL)
        loop.stop()

    held = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in held.items():
            signal.signal(each, handler)


def main(
    bundle: Annotated[Path, typer.Argument(help="Directory that `export.build` wrote.")],
    source: Annotated[
        str, typer.Argument(help="Camera, video, bag, folder, pipeline or - (standard input).")
    ],
    *,
    ask: Annotated[str, typer.Option(help="What to ask about what is seen.")],
    every: Annotated[
        float, typer.Option(help="Seconds from one answer to the next; 0: as fast as it can.")
    ] = 0.0,
    every_frame: Annotated[
        bool, typer.Option("--every-frame", help="Of a recording, answer about each frame.")
    ] = False,
    on_change: Annotated[
        bool, typer.Option("--on-change", help="Answer only when the scene has changed.")
    ] = False,
    reuse: Annotated[
        bool, typer.Option(help="Keep the tokens and the answer while the scene stands still.")
    ] = True,
    refresh: Annotated[
        float, typer.Option(help="Seconds after which a still scene is looked at anew.")
    ] = 10.0,
    rotate: Annotated[int, typer.Option(help="Degrees clockwise: 0, 90, 180 or 270.")] = 0,
    crop: Annotated[
        str | None, typer.Option(help="Part of the frame to look at: x,y,width,height in pixels.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Most frames per second to read.")] = None,
    topic: Annotated[
        str | None, typer.Option(help="Topic of a bag, by name or message type.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Folder to keep frames, overlays and answers in; not those reused."),
    ] = None,
    answers: Annotated[int | None, typer.Option(min=1, help="End after that many answers.")] = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Read commands from standard input: ask QUESTION, pause, resume, stop.",
        ),
    ] = False,
    latency_target: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds to the first token: chooses among the bundle's token budgets."
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, help="Serve Prometheus text on this port of 127.0.0.1; 0: any."),
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="Keep one line on stderr that says how it goes.")
    ] = False,
    system: SystemOption = None,
    model: ModelOptions,
    answering: AnswerOptions = SHORT_ANSWERS,
) -> None:
    """Watch a camera and answer about what it sees, again and again.

    One JSON line on stdout per answer; the last line, `"event": "end"`, counts what became of every
    frame. Only the newest frame is answered about: `age_ms` is how old it was when the answer
    began. Ctrl-C or SIGTERM ends it in order.
    """
    from runtime.camera import CameraOptions
    from runtime.frames import SourceOptions
    from runtime.frames.opening import crop_from_text
    from runtime.stillness import StillnessOptions

    if control and (source == "-" or source.startswith("raw:")):
        raise OptionError(
            "Standard input cannot hold frames and commands. Leave --control out, or give another "
            "source."
        )
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    options = WatchOptions(
        camera=CameraOptions(
            question=ask,
            every_s=every,
            every_frame=every_frame,
            on_change=on_change,
            reuse=reuse,
            stillness=StillnessOptions(refresh_s=refresh),
        ),
        source=SourceOptions(
            rotate=rotate,  # type: ignore[arg-type]  # checked there
            crop=crop_from_text(crop) if crop else None,
            fps=fps,
            topic=topic,
        ),
        generation=answering.generation(),
        model=model,
        system=system,
        latency_target_ms=latency_target,
        metrics_port=metrics_port,
        status=status,
        record=record,
        answers=answers,
    )
    watch(bundle, source, options, _print_line, sys.stdin if control else None)


def _print_line(document: dict[str, Any]) -> None:
    print(json.dumps(document, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    run(main, EXAMPLES)
