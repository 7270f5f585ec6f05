"""What happens to a robot: cables, clocks, disks, hanging backends, signals."""

from __future__ import annotations

import gc
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.bundle import Bundle
from engines.errors import BackendError, EngineError, SourceError
from runtime.camera import recording as recording_module
from runtime.camera.loop import CameraLoop, CameraOptions
from runtime.camera.pacing import at_their_own_pace
from runtime.camera.parts import CameraAnswer, Stall
from runtime.camera.recording import Recording
from runtime.frames import FrameSource
from runtime.frames.frame import Capture, ReadErrors
from runtime.frames.reconnect import Reconnecting
from runtime.vision import Pixels, VisualTokens
from tests.runtime.camera.doubles import Script, ShadeAnswerer, ShadeEncoder, numbered, source_of

LOOK = CameraOptions("shade?", reuse=False)


def test_a_source_that_vanishes_twenty_times_goes_on_being_answered() -> None:
    openings = itertools.count(1)

    def plug_in() -> Script:
        if next(openings) % 3 == 2:
            raise SourceError("no such device")
        return Script(numbered(4), period_s=0.002)

    source = FrameSource(Reconnecting(plug_in, first_wait_s=0.001, longest_wait_s=0.002))
    loop = CameraLoop([source], ShadeEncoder(), ShadeAnswerer(), LOOK)
    answers = 0
    for item in loop.answers():
        answers += isinstance(item, CameraAnswer)
        if source.errors.counts["disconnected"] >= 21:
            break
    assert answers >= 20
    assert source.errors.counts["reconnection failed"] >= 9


def test_the_resolution_changes_in_mid_stream() -> None:
    sizes = [(8, 8), (480, 640), (1, 1), (1080, 1920), (33, 17)]
    pictures = (np.full((*size, 3), 9, np.uint8) for size in sizes for _ in range(4))
    options = CameraOptions("shade?", every_frame=True)
    loop = CameraLoop([source_of(pictures, live=False)], ShadeEncoder(), ShadeAnswerer(), options)
    answers = list(loop.answers())
    assert len(answers) == 20
    assert {answer.answer.text for answer in answers} == {"shade? 9"}


class SetBack(Script):
    """A camera whose clock is set back an hour halfway."""

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        for index, capture in enumerate(super().captures(errors)):
            shift_ns = -3_600_000_000_000 if index >= 20 else 0
            yield Capture(10**18 + index * 10_000_000 + shift_ns, capture.image)


@pytest.mark.parametrize("live", [True, False])
def test_the_clock_jumps_backwards(live: bool) -> None:
    source = FrameSource(SetBack(numbered(40), live, period_s=0.005))
    started_s = time.monotonic()
    loop = CameraLoop([source], ShadeEncoder(), ShadeAnswerer(), LOOK)
    answers = list(loop.answers())
    assert time.monotonic() - started_s < 20  # and not an hour
    assert answers[-1].encoded.queued.index == 39
    assert all(0 <= answer.age_ms < 1000 for answer in answers)


def test_a_recording_with_a_day_between_two_frames_does_not_wait_a_day() -> None:
    class Gap(Script):
        def captures(self, errors: ReadErrors) -> Iterator[Capture]:
            for index, capture in enumerate(super().captures(errors)):
                yield Capture(index * 86_400_000_000_000, capture.image)

    started_s = time.monotonic()
    assert len(list(at_their_own_pace(FrameSource(Gap(numbered(3), live=False))))) == 3
    assert time.monotonic() - started_s < 1


class Hanging(ShadeAnswerer):
    """Hangs once, deaf to every interruption, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def answer(
        self,
        visual: VisualTokens,
        question: str,
        prefilled: Callable[[], None],
        interrupted: Callable[[], bool],
    ):
        if self.calls == 2:
            self.release.wait(10)
        return super().answer(visual, question, prefilled, interrupted)


def test_a_backend_that_hangs_is_reported_and_the_next_answer_is_about_now() -> None:
    answerer = Hanging()
    source = source_of(itertools.cycle(numbered(256, 100, 100)), period_s=0.002)
    options = CameraOptions("shade?", reuse=False, stall_after_s=0.2)
    loop = CameraLoop([source], ShadeEncoder(), answerer, options)
    items = []
    held_up = None
    for item in loop.answers():
        items.append(item)
        if isinstance(item, Stall):
            gc.collect()
            pictures = sum(
                type(thing) is np.ndarray and thing.shape == (100, 100, 3)
                for thing in gc.get_objects()
            )
            held_up = loop.frames
            answerer.release.set()
            assert pictures < 50  # frames do not pile up
        if len(items) >= 10 and held_up is not None:
            break
    stalls = [item for item in items if isinstance(item, Stall)]
    assert stalls
    assert stalls[0].seconds >= 0.2
    after = items[items.index(stalls[-1]) + 2]  # the one after the answer that hung
    assert after.encoded.queued.index >= held_up - 1


def test_stopping_does_not_wait_for_a_backend_that_hangs() -> None:
    answerer = Hanging()
    answerer.calls = 2
    loop = CameraLoop([source_of(itertools.cycle(numbered(9)))], ShadeEncoder(), answerer, LOOK)
    threading.Timer(0.1, loop.stop).start()
    started_s = time.monotonic()
    assert list(loop.answers()) == []
    assert time.monotonic() - started_s < 5
    answerer.release.set()


class Failing(ShadeAnswerer):
    """Fails at the calls of a set."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad = bad

    def answer(
        self,
        visual: VisualTokens,
        question: str,
        prefilled: Callable[[], None],
        interrupted: Callable[[], bool],
    ):
        said = super().answer(visual, question, prefilled, interrupted)
        if self.calls in self.bad:
            raise BackendError("out of memory")
        return said


def test_a_backend_that_fails_now_and_then_is_asked_again() -> None:
    options = CameraOptions("shade?", every_frame=True, reuse=False)
    source = source_of(numbered(20), live=False)
    loop = CameraLoop([source], ShadeEncoder(), Failing({3, 4, 10}), options)
    assert len(list(loop.answers())) == 17
    assert loop.drops == {"answering failed": 3}


def test_a_backend_that_always_fails_ends_the_loop_with_its_error() -> None:
    source = source_of(itertools.cycle(numbered(9)))
    loop = CameraLoop([source], ShadeEncoder(), Failing(set(range(100))), LOOK)
    with pytest.raises(BackendError, match="out of memory"):
        list(loop.answers())
    assert loop.drops["answering failed"] == 5


def test_a_frame_that_cannot_be_encoded_is_dropped() -> None:
    class Choosy(ShadeEncoder):
        def encode_one(self, image: Pixels) -> VisualTokens:
            if image[0, 0, 0] % 3 == 0:
                raise EngineError("the engine is upset")
            return super().encode_one(image)

    options = CameraOptions("shade?", every_frame=True)
    loop = CameraLoop([source_of(numbered(9), live=False)], Choosy(), ShadeAnswerer(), options)
    assert len(list(loop.answers())) == 6
    assert loop.drops == {"encoding failed": 3}


def test_a_bug_in_a_thread_reaches_the_caller() -> None:
    class Broken(ShadeEncoder):
        def encode_one(self, image: Pixels) -> VisualTokens:
            raise ZeroDivisionError

    loop = CameraLoop([source_of(numbered(5))], Broken(), ShadeAnswerer(), LOOK)
    with pytest.raises(ZeroDivisionError):
        list(loop.answers())


def one_answer() -> CameraAnswer:
    loop = CameraLoop([source_of(numbered(1), live=False)], ShadeEncoder(), ShadeAnswerer(), LOOK)
    (answer,) = loop.answers()
    return answer


def test_a_disk_that_is_full_costs_recordings_and_leaves_no_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language_bundle: Bundle
) -> None:
    drawn = []

    def draw(path: Path, *_: object) -> None:
        drawn.append(path)
        if len(drawn) == 2:
            raise recording_module.OptionError("No room to write")
        path.write_bytes(b"png")

    monkeypatch.setattr(recording_module, "save_overlay", draw)
    monkeypatch.setattr(
        Image.Image, "save", _full_disk_after(Image.Image.save, failing_call=3), raising=True
    )
    recording = Recording(tmp_path / "kept", language_bundle)
    answer = one_answer()
    for number in range(4):
        object.__setattr__(answer.encoded.queued, "index", number)
        recording.keep(answer, {"number": number})
        done = number + 1
        while recording.written + recording.drops["not written"] < done:
            time.sleep(0.001)  # one at a time: which of them meets the full disk is known
    recording.close()
    assert recording.written == 2
    assert recording.drops == {"not written": 2}
    names = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert [name for name in names if name.endswith(".json")] == ["00000000.json", "00000003.json"]
    assert not [name for name in names if name.startswith(".")]
    assert json.loads((tmp_path / "kept" / "00000003.json").read_text()) == {"number": 3}


def _full_disk_after(save: Callable[..., None], failing_call: int) -> Callable[..., None]:
    calls = itertools.count(1)

    def guarded(self: Image.Image, *arguments: object, **options: object) -> None:
        if next(calls) == failing_call:
            raise OSError(28, "No space left on device")
        save(self, *arguments, **options)

    return guarded


@pytest.mark.parametrize(
    ("number", "after_s"),
    [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.05), (signal.SIGTERM, 0.3), (signal.SIGINT, 0.7)],
)
def test_signals_at_any_moment_leave_files_whole(
    number: signal.Signals, after_s: float, tmp_path: Path, language_bundle: Bundle
) -> None:
    command = [sys.executable, "-m", "runtime.watch", str(language_bundle.root), "raw:64x48"]
    command += ["--ask", "What is it?", "--max-tokens", "4", "--record", str(tmp_path / "kept")]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=False,
    )
    feeding = threading.Thread(target=_feed, args=(process,), daemon=True)
    feeding.start()
    first = process.stdout.readline()
    assert json.loads(first)["event"] == "answer"
    time.sleep(after_s)
    process.send_signal(number)
    rest, complaints = process.communicate(timeout=20)
    assert process.returncode == 0, complaints.decode()
    lines = [json.loads(line) for line in (first + rest).splitlines()]
    assert lines[-1]["event"] == "end"
    kept = list((tmp_path / "kept").iterdir())
    assert not [path for path in kept if path.name.startswith(".")]
    recorded = [path for path in kept if path.suffix == ".json"]
    assert len(recorded) == lines[-1]["recorded"] >= 1
    for path in recorded:
        assert json.loads(path.read_text())["event"] == "answer"
        Image.open(path.with_suffix(".jpg")).load()
        Image.open(path.with_suffix(".overlay.png")).load()


def _feed(process: subprocess.Popen[bytes]) -> None:
    frame = np.zeros((48, 64, 3), np.uint8)
    try:
        for shade in itertools.cycle(range(0, 250, 50)):
            process.stdin.write((frame + shade).astype(np.uint8).tobytes())
            process.stdin.flush()
            time.sleep(0.01)
    except (OSError, ValueError):
        return  # the reader has gone
