"""Several cameras: one batch a round, each answered, and none stopped by another's fault."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from engines.errors import BackendError, EngineError, SourceError
from runtime.camera.loop import CameraLoop
from runtime.camera.parts import CameraAnswer, CameraOptions
from runtime.camera.scene_change import StillnessOptions
from runtime.frames import FrameSource
from runtime.frames.frame import Capture, ReadErrors
from runtime.frames.reconnect import Reconnecting
from runtime.vision import Pixels, VisualTokens
from tests.runtime.camera.doubles import Script, ShadeAnswerer, ShadeEncoder, numbered

IN_TURN = CameraOptions("shade?", every_frame=True, reuse=False)
LOOK = CameraOptions("shade?", reuse=False)


class BatchShades(ShadeEncoder):
    """Encodes batches; refuses pictures of a shade."""

    def __init__(self, refused: int | None = None) -> None:
        super().__init__()
        self.refused = refused
        self.batches: list[list[int]] = []

    def encode(self, images: Sequence[Pixels]) -> list[VisualTokens]:
        shades = [int(image[0, 0, 0]) for image in images]
        self.batches.append(shades)
        if self.refused in shades:
            raise EngineError("one of the pictures is upsetting")
        return super().encode(images)


def camera(name: str, shades: Sequence[int], live: bool = False) -> FrameSource:
    pictures = (np.full((8, 8, 3), shade, np.uint8) for shade in shades)
    script = Script(pictures, live, 0.002 if live else 0.0)
    script.name = name
    return FrameSource(script)


def answers_of(loop: CameraLoop) -> list[CameraAnswer]:
    return [item for item in loop.answers() if isinstance(item, CameraAnswer)]


def said_by(answers: Sequence[CameraAnswer]) -> dict[str, list[str]]:
    said: dict[str, list[str]] = {}
    for answer in answers:
        said.setdefault(answer.encoded.queued.frame.source, []).append(answer.answer.text)
    return said


def test_every_frame_of_every_recording_is_answered_with_its_source() -> None:
    encoder = BatchShades()
    sources = [camera("left", [1, 2, 3]), camera("right", [101, 102, 103, 104])]
    loop = CameraLoop(sources, encoder, ShadeAnswerer(), IN_TURN)
    assert said_by(answers_of(loop)) == {
        "left": ["shade? 1", "shade? 2", "shade? 3"],
        "right": ["shade? 101", "shade? 102", "shade? 103", "shade? 104"],
    }
    assert loop.frames == 7
    assert not loop.drops
    assert not loop.errors


class Together(Script):
    """Gives each picture only when every camera has one to give."""

    def __init__(self, barrier: threading.Barrier, shade: int) -> None:
        super().__init__(iter(()))
        self.barrier, self.shade, self.live = barrier, shade, False

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        for _ in range(5):
            self.barrier.wait(5)
            picture = np.full((8, 8, 3), self.shade, np.uint8)
            yield Capture(0, lambda picture=picture: picture)


def test_a_round_is_one_batch() -> None:
    barrier = threading.Barrier(3)
    sources = [FrameSource(Together(barrier, shade)) for shade in (10, 20, 30)]
    encoder = BatchShades()
    answers = answers_of(CameraLoop(sources, encoder, ShadeAnswerer(0.0, 0.02), IN_TURN))
    assert len(answers) == 15
    assert [10, 20, 30] in encoder.batches
    assert len(encoder.batches) < 15
    for number, answer in enumerate(answers[:3]):
        assert answer.encoded.queued.camera in (0, 1, 2), number


class Dying(Script):
    """A camera whose driver fails in a way nobody foresaw."""

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        yield from itertools.islice(super().captures(errors), 2)
        raise RuntimeError("the driver crashed")


def test_a_camera_that_dies_does_not_stop_the_others() -> None:
    dying = FrameSource(Dying(numbered(9), live=False))
    healthy = camera("healthy", range(50, 70))
    loop = CameraLoop([dying, healthy], BatchShades(), ShadeAnswerer(), IN_TURN)
    said = said_by(answers_of(loop))
    assert len(said["healthy"]) == 20
    assert len(said["script"]) == 2
    assert loop.errors == {"source failed": 1}
    assert "the driver crashed" in dying.errors.last


@pytest.mark.parametrize("count", [1, 2])
def test_where_every_camera_died_the_last_error_is_raised(count: int) -> None:
    """After all that came before it was answered: a loop without a camera must not end as done."""
    sources = [FrameSource(Dying(numbered(9), live=False)) for _ in range(count)]
    loop = CameraLoop(sources, BatchShades(), ShadeAnswerer(), IN_TURN)
    answers = 0
    with pytest.raises(RuntimeError, match="the driver crashed"):
        for _ in loop.answers():
            answers += 1
    assert answers == 2 * count
    assert loop.errors == {"source failed": count}
    assert not loop.drops


class WaitsForTheNextRound(ShadeAnswerer):
    """Writes of the last camera until the next round was encoded, and a while longer."""

    def __init__(self, encoder: BatchShades) -> None:
        super().__init__()
        self.encoder = encoder

    def answer(self, visual: VisualTokens, question: str, prefilled: Any, interrupted: Any):
        before = len(self.encoder.batches)
        answer = super().answer(visual, question, prefilled, interrupted)
        if visual.tokens[0, 0, 0] >= 100:
            while len(self.encoder.batches) == before and not interrupted():
                time.sleep(0.001)
            time.sleep(0.05)
        return answer


def test_tokens_of_every_camera_are_dropped_when_they_have_waited_too_long() -> None:
    """The first answers are expected to take no time, so a round is encoded far too soon."""
    sources = [camera("left", [10] * 5000, live=True), camera("right", [110] * 5000, live=True)]
    encoder = BatchShades()
    loop = CameraLoop(sources, encoder, WaitsForTheNextRound(encoder), LOOK)
    answers = 0
    for item in loop.answers():
        answers += isinstance(item, CameraAnswer)
        if loop.drops["stale"] >= 2:
            break
    assert answers >= 2
    assert [10, 110] in encoder.batches


def test_a_camera_that_vanishes_comes_back_while_the_others_go_on() -> None:
    openings = itertools.count(1)

    def plug_in() -> Script:
        if next(openings) == 2:
            raise SourceError("no such device")
        return Script(numbered(3), period_s=0.001)

    shaky = FrameSource(Reconnecting(plug_in, first_wait_s=0.001, longest_wait_s=0.002))
    steady = FrameSource(Script(itertools.cycle(numbered(200)), period_s=0.001))
    loop = CameraLoop([shaky, steady], BatchShades(), ShadeAnswerer(), LOOK)
    cameras = set()
    for item in loop.answers():
        if shaky.errors.counts["disconnected"] >= 5:
            cameras.add(item.encoded.queued.camera)
        if cameras == {0, 1}:
            break
    assert loop.errors["disconnected"] >= 5
    assert loop.errors["reconnection failed"] == 1


def test_a_frame_that_cannot_be_encoded_costs_itself_only() -> None:
    barrier = threading.Barrier(2)
    sources = [FrameSource(Together(barrier, 10)), FrameSource(Together(barrier, 66))]
    loop = CameraLoop(sources, BatchShades(refused=66), ShadeAnswerer(), IN_TURN)
    assert [answer.answer.text for answer in answers_of(loop)] == ["shade? 10"] * 5
    assert loop.drops == {"encoding failed": 5}
    assert sources[1].errors.counts == {"encoding failed": 5}


def test_a_still_camera_keeps_its_tokens_while_another_moves() -> None:
    options = CameraOptions(
        "shade?", every_frame=True, stillness=StillnessOptions(learn_s=0.0, refresh_s=60.0)
    )
    sources = [camera("still", [80] * 20), camera("moving", [0, 80, 160, 240] * 5)]
    answerer = ShadeAnswerer()
    answers = answers_of(CameraLoop(sources, BatchShades(), answerer, options))
    reused = {answer.encoded.queued.frame.source for answer in answers if answer.reused}
    assert reused == {"still"}
    assert len(answers) == 40
    assert answerer.calls == 40 - sum(answer.reused for answer in answers)
    assert {a.answer.text for a in answers if a.encoded.queued.camera == 0} == {"shade? 80"}


def test_on_change_is_each_cameras_own() -> None:
    options = CameraOptions(
        "shade?",
        every_frame=True,
        on_change=True,
        stillness=StillnessOptions(learn_s=0.0, refresh_s=60.0),
    )
    sources = [camera("still", [80] * 20), camera("moving", [0, 80, 160, 240] * 5)]
    loop = CameraLoop(sources, BatchShades(), ShadeAnswerer(), options)
    said = said_by(answers_of(loop))
    assert len(said["still"]) < 5
    assert len(said["moving"]) == 20
    assert loop.drops["unchanged"] == 20 - len(said["still"])


def test_a_language_model_that_always_fails_ends_the_loop_with_its_error() -> None:
    class Failing(ShadeAnswerer):
        def answer(self, *_: object):
            raise BackendError("out of memory")

    sources = [camera("left", range(20)), camera("right", range(20))]
    loop = CameraLoop(sources, BatchShades(), Failing(), IN_TURN)
    with pytest.raises(BackendError, match="out of memory"):
        answers_of(loop)
    assert loop.drops["answering failed"] == 5


def test_control_while_running() -> None:
    sources = [camera(name, range(200), live=True) for name in ("left", "right")]
    for source in sources:
        source._reader._pictures = itertools.cycle(numbered(100))
    loop = CameraLoop(sources, BatchShades(), ShadeAnswerer(), LOOK)
    answers = loop.answers()
    assert next(answers).answer.text.startswith("shade?")
    loop.ask("colour?")
    assert any(next(answers).answer.text.startswith("colour?") for _ in range(20))
    loop.stop()
    list(answers)
    assert "camera loop" not in {thread.name for thread in threading.enumerate()}
