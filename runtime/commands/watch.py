"""Watch cameras and answer about what they see: `python -m runtime.watch`.

Each answer is one JSON line on stdout with the age of its frame. Progress and warnings go to
stderr.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines.errors import OptionError
from engines.memory.context_length import ContextNeed
from runtime.camera.budgets.goal_options import GoalOptions
from runtime.camera.view_options import ViewOptions
from runtime.commands.systemd import tell_systemd
from runtime.frames.source import SourceOptions
from runtime.language.generate import GenerationOptions
from runtime.model_options import ModelOptions, SystemOption

if TYPE_CHECKING:
    from runtime.camera.budgets.budgeted import BudgetedEncoder
    from runtime.camera.budgets.controller import BudgetController
    from runtime.camera.budgets.goal import Goal
    from runtime.camera.loop import CameraLoop
    from runtime.camera.parts import Answerer, CameraAnswer, CameraOptions, Encoder, Stall
    from runtime.camera.recording import Recording
    from runtime.frames import FrameSource
    from runtime.model import Model

EXAMPLES = (
    'python -m runtime.watch build/pocket /dev/video0 --ask "Is a person in the way?"',
    'python -m runtime.watch build/pocket csi:0 --ask "What is ahead?" --every 1.0 --rotate 180',
    'python -m runtime.watch build/pocket csi:0 csi:1 --ask "Is the way free?"',
    'python -m runtime.watch build/pocket clip.mp4 --ask "What is shown?" --every-frame --fps 2',
    'python -m runtime.watch build/pocket log.mcap --topic /front --ask "Is the door open?"',
    'python -m runtime.watch build/pocket rtsp://camera/live --ask "Who is there?" --on-change',
    'python -m runtime.watch build/pocket 0 --ask "What is ahead?" --latency-target 200ms',
)

_PROMPT_TOKENS = 512
"""The question may be changed to a longer one while the loop runs."""


@dataclass(frozen=True)
class WatchOptions:
    """How to watch.

    Attributes:
        camera: the question and when it is answered.
        source: how frames are looked at, of every source; None looks at them as they are.
        generation: how answers are written; None writes 64 tokens at most.
        model: how the bundle is loaded.
        system: instructions before the question.
        goal: choose among the bundle's budgets so that it is kept; None keeps to one graph.
        metrics_port: serve Prometheus text there, on the loopback interface.
        status: keep a line on stderr that says how it goes.
        record: folder that keeps frames, overlays and answers.
        answers: end after that many.
        warm_up: answer once about a black picture before the first frame is asked for.
    """

    camera: CameraOptions
    source: SourceOptions | None = None
    generation: GenerationOptions | None = None
    model: ModelOptions = field(default_factory=ModelOptions)
    system: str | None = None
    goal: Goal | None = None
    metrics_port: int | None = None
    status: bool = False
    record: Path | None = None
    answers: int | None = None
    warm_up: bool = False


def watch(
    bundle: str | Path,
    source: str | FrameSource | Sequence[str | FrameSource],
    options: WatchOptions | str,
    show: Callable[[dict[str, Any]], None],
    control: Iterable[str] | None = None,
) -> int:
    """Watch a source, or several, until all have ended or the process is told to stop.

    Args:
        bundle: the bundle's directory.
        source: what to watch; see `runtime.frames.opening.KINDS`. Of several, the newest frames are
            encoded as one batch. A source that is open already is closed at the end, and
            `options.source` does not apply to it.
        options: how to watch; or the question alone.
        show: called with each answer, stall and, last, the summary.
        control: lines that steer the loop while it runs: ``ask QUESTION``, ``pause``, ``resume``
            and ``stop``.

    Returns:
        How many answers could not be recorded, though the disk was not too slow for them.

    Raises:
        FoveateError: anything the user can fix.
    """
    from runtime.camera.parts import CameraOptions
    from runtime.camera.steering import obey, stopping_on_signals
    from runtime.camera.watch_lines import summary_of

    if isinstance(options, str):
        options = WatchOptions(CameraOptions(options))
    given = [source] if isinstance(source, str) or not isinstance(source, Sequence) else source
    with ExitStack() as open_things:
        sources = [open_things.enter_context(_open(each, options.source)) for each in given]
        # Left to the garbage collector: a backend that hangs may still be inside it at the end.
        model = _open_model(bundle, options, len(sources))
        tell_systemd("READY=1")
        recording = _open_recording(model, options, len(sources), open_things)
        loop, controller = _make_loop(sources, model, options, open_things)
        observers = _observers(loop, controller, options, open_things)
        if control is not None:
            threading.Thread(target=obey, args=(control, loop), daemon=True).start()
        with stopping_on_signals(loop), closing(loop.answers()) as items:
            count = _tell_all(items, show, observers, recording, options.answers)
        if recording is not None:
            recording.close()
        show(summary_of(loop, count, recording, controller))
    return 0 if recording is None else recording.failures


def _open(source: str | FrameSource, view: SourceOptions | None) -> FrameSource:
    from runtime.frames import open_source

    return open_source(source, view) if isinstance(source, str) else source


def _open_model(bundle: str | Path, options: WatchOptions, cameras: int) -> Model:
    """Load a bundle, and answer once if it is to be warmed up."""
    from runtime.camera.answering import SHORT_TOKENS

    generation = options.generation or GenerationOptions()
    most_tokens = generation.max_tokens or SHORT_TOKENS
    need = ContextNeed(None, _PROMPT_TOKENS, most_tokens, exchanges=1)
    model = options.model.open(bundle, batch=cameras, need=need.with_text(options.system))
    if options.warm_up:
        print(f"warmed up in {model.warm_up(cameras):.1f} s", file=sys.stderr)
    return model


def _open_recording(
    model: Model, options: WatchOptions, cameras: int, open_things: ExitStack
) -> Recording | None:
    from runtime.camera.recording import Recording

    if options.record is None:
        return None
    recording = Recording(options.record, model.bundle, cameras=cameras)
    open_things.callback(recording.close)
    return recording


def _make_loop(
    sources: Sequence[FrameSource], model: Model, options: WatchOptions, open_things: ExitStack
) -> tuple[CameraLoop, BudgetController | None]:
    """Return the loop and what chooses its budgets, if there is a goal."""
    from runtime.camera.answering import FrameAnswerer, FrameEncoder
    from runtime.camera.loop import CameraLoop

    encoder: Encoder = FrameEncoder(model.encoder)
    answerer: Answerer = FrameAnswerer(model, options.generation, options.system)
    controller = None
    if options.goal is not None:
        encoder, answerer = _budgeted(
            model, answerer, options, options.goal, open_things, len(sources)
        )
        controller = encoder.controller
    return CameraLoop(sources, encoder, answerer, options.camera), controller


def _budgeted(
    model: Model,
    answerer: Answerer,
    options: WatchOptions,
    goal: Goal,
    open_things: ExitStack,
    cameras: int,
) -> tuple[BudgetedEncoder, Answerer]:
    """Put a budget controller between the loop and the bundle's graphs."""
    from runtime.camera.budgets.budgeted import BudgetedEncoder, ObservedAnswerer
    from runtime.camera.budgets.power import Tegrastats
    from runtime.vision.graph_pool import GraphPool

    if options.model.visual_tokens is not None:
        raise OptionError(
            "--visual-tokens fixes the budget, and a target chooses it. Leave one out."
        )
    given = options.model
    encoder = BudgetedEncoder(
        GraphPool(
            model.bundle,
            engine=given.engine,
            threads=given.threads,
            opened=model.encoder,
            batch=cameras,
        )
    )
    meter = open_things.enter_context(Tegrastats()) if goal.kind == "power" else None
    controller = encoder.calibrate(answerer, options.camera.question, goal, meter)
    return encoder, ObservedAnswerer(answerer, controller, meter)


def _observers(
    loop: CameraLoop,
    controller: BudgetController | None,
    options: WatchOptions,
    open_things: ExitStack,
) -> list[Callable[[CameraAnswer], None]]:
    """Open what is to be told of every answer besides the caller."""
    from runtime.camera.metrics import MetricsServer, StatusLine

    observers: list[Callable[[CameraAnswer], None]] = []
    if options.metrics_port is not None:
        server = MetricsServer(loop, options.metrics_port, controller)
        open_things.callback(server.close)
        observers.append(server.observe)
    if options.status:
        observers.append(open_things.enter_context(StatusLine(loop)).show)
    return observers


def _tell_all(
    items: Iterable[CameraAnswer | Stall],
    show: Callable[[dict[str, Any]], None],
    observers: Sequence[Callable[[CameraAnswer], None]],
    recording: Recording | None,
    most: int | None,
) -> int:
    """Tell of all that a loop gives, until that many answers; return how many there were."""
    from runtime.camera.parts import CameraAnswer
    from runtime.camera.watch_lines import document_from_answer, document_from_stall

    count = 0
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
        count += 1
        if count == most:
            break
    return count


def main(
    bundle: Annotated[Path, typer.Argument(help="Directory that `export.build` wrote.")],
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Camera, video, bag, folder, pipeline or - (standard input). Of several, the "
            "newest frames are encoded as one batch; one that fails does not stop the others."
        ),
    ],
    *,
    ask: Annotated[str, typer.Option(help="What to ask about what is seen.")],
    every_frame: Annotated[
        bool, typer.Option("--every-frame", help="Of a recording, answer about each frame.")
    ] = False,
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
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65_535, help="Serve Prometheus text on this port of 127.0.0.1; 0: any."
        ),
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="Keep one line on stderr that says how it goes.")
    ] = False,
    warm_up: Annotated[
        bool,
        typer.Option(
            "--warm-up",
            help="Answer once about a black picture first, so that the first frame does not wait "
            "for kernels, weights and buffers.",
        ),
    ] = False,
    system: SystemOption = None,
    view: ViewOptions,
    source: SourceOptions,
    budget: GoalOptions,
    model: ModelOptions,
    generation: GenerationOptions = GenerationOptions(),
) -> int:
    """Watch cameras and answer about what they see, again and again.

    One JSON line on stdout per answer; the last line, `"event": "end"`, counts what became of every
    frame. Only the newest frame is answered about: `age_ms` is how old it was when the answer
    began. Ctrl-C or SIGTERM ends it in order. The exit code is 1 when `--record` lost an answer for
    another reason than a slow disk; the last line counts them.
    """
    _refuse_shared_input(sources, control)
    from runtime.camera.steering import lines_of
    from runtime.frames.stdin import standard_input

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    options = WatchOptions(
        camera=view.camera(ask, every_frame),
        source=source,
        generation=generation,
        model=model,
        system=system,
        goal=budget.goal(),
        metrics_port=metrics_port,
        status=status,
        record=record,
        answers=answers,
        warm_up=warm_up,
    )
    commands = lines_of(standard_input()) if control else None
    return int(watch(bundle, sources, options, _print_line, commands) > 0)


def _refuse_shared_input(sources: Sequence[str], control: bool) -> None:
    piped = [source for source in sources if source == "-" or source.startswith("raw:")]
    if len(piped) + control > 1:
        raise OptionError(
            f"Standard input cannot hold {' and '.join(piped)}{' and commands' if control else ''} "
            "at once. Leave --control out, or give another source."
        )


def _print_line(document: dict[str, Any]) -> None:
    print(json.dumps(document, ensure_ascii=False), flush=True)
