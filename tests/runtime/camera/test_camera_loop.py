"""The camera loop over doubles: newest frame only, control while running, still scenes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engines.errors import OptionError
from runtime.camera.loop import CameraLoop, CameraOptions
from runtime.camera.parts import CameraAnswer
from runtime.camera.scene_change import StillnessOptions
from runtime.model import Answer
from runtime.vision import VisualTokens
from tests.runtime.camera.doubles import ShadeAnswerer, ShadeEncoder, numbered, source_of

ALWAYS_LOOK = CameraOptions("shade?", reuse=False)


def wait_until(happened: Callable[[], bool]) -> None:
    """Wait for what another thread does; ten seconds are enough for any machine."""
    deadline_s = time.monotonic() + 10
    while not happened():
        if time.monotonic() > deadline_s:
            raise TimeoutError
        time.sleep(0.001)


def answers_of(loop: CameraLoop) -> list[CameraAnswer]:
    return [item for item in loop.answers() if isinstance(item, CameraAnswer)]


def test_each_frame_of_a_recording_in_turn() -> None:
    options = CameraOptions("shade?", every_frame=True, reuse=False)
    loop = CameraLoop(
        [source_of(numbered(20), live=False)], ShadeEncoder(), ShadeAnswerer(), options
    )
    answers = answers_of(loop)
    assert [answer.answer.text for answer in answers] == [f"shade? {n}" for n in range(20)]
    assert [answer.encoded.queued.index for answer in answers] == list(range(20))
    assert not loop.drops


class Gated(ShadeAnswerer):
    """Writes an answer for as long as the test wants."""

    def __init__(self, may_end: Callable[[], bool]) -> None:
        super().__init__()
        self.may_end = may_end

    def answer(
        self,
        visual: VisualTokens,
        question: str,
        prefilled: Callable[[], None],
        interrupted: Callable[[], bool],
    ) -> Answer:
        said = super().answer(visual, question, prefilled, interrupted)
        wait_until(lambda: self.may_end() or interrupted())
        return said


def test_only_the_newest_frame_is_answered_and_every_frame_is_accounted_for() -> None:
    """While one answer is written fifty frames come; the next is about one of the last of them."""
    source = source_of(numbered(200))
    answers: list[CameraAnswer] = []

    def fifty_more_came() -> bool:
        return loop.frames >= min(50 * (answerer.calls), 200)

    answerer = Gated(fifty_more_came)
    loop = CameraLoop([source], ShadeEncoder(), answerer, ALWAYS_LOOK)
    answers = answers_of(loop)
    indices = [answer.encoded.queued.index for answer in answers]
    assert indices == sorted(set(indices))
    assert loop.frames == 200
    assert len(answers) + sum(loop.drops.values()) == 200
    assert loop.drops["superseded"] > 100
    assert indices[-1] == 199  # the last frame is not lost


def test_encoding_overlaps_decoding() -> None:
    """An answer ends only once the next frame was encoded: without overlap it never would."""
    encoder = ShadeEncoder()
    answerer = Gated(lambda: encoder.calls > answerer.calls)
    loop = CameraLoop([source_of(itertools.cycle(numbered(200)))], encoder, answerer, ALWAYS_LOOK)
    assert len(list(itertools.islice(loop.answers(), 5))) == 5


def test_answers_come_at_the_pace_asked_for() -> None:
    options = CameraOptions("shade?", every_s=0.1, reuse=False)
    source = source_of(itertools.cycle(numbered(200)))
    loop = CameraLoop([source], ShadeEncoder(), ShadeAnswerer(), options)
    started_s = time.monotonic()
    for count, _ in enumerate(loop.answers(), start=1):
        if count == 5:
            break
    assert time.monotonic() - started_s >= 0.4


def test_the_question_changes_and_the_loop_pauses_while_running() -> None:
    loop = CameraLoop(
        [source_of(itertools.cycle(numbered(200)))], ShadeEncoder(), ShadeAnswerer(), ALWAYS_LOOK
    )
    answers = loop.answers()
    assert next(answers).answer.text.startswith("shade?")
    loop.ask("colour?")
    late = list(itertools.islice(answers, 12))  # what was under way had the old question
    assert late[-1].answer.text.startswith("colour?")
    loop.pause()
    frames = loop.frames
    wait_until(lambda: loop.frames > frames + 50)  # the source goes on being read
    while not loop._out.empty():  # what was under way
        next(answers)
    frames = loop.frames
    wait_until(lambda: loop.frames > frames + 50)
    assert loop._out.empty()
    loop.resume()
    newest = next(answers).encoded.queued.index
    assert newest >= frames
    loop.stop()
    assert list(answers) == []


def test_stop_from_another_thread_ends_everything() -> None:
    source = source_of(itertools.cycle(numbered(200)))
    loop = CameraLoop([source], ShadeEncoder(), ShadeAnswerer(0.0, 30.0), ALWAYS_LOOK)
    threading.Timer(0.2, loop.stop).start()
    started_s = time.monotonic()
    assert list(loop.answers()) == []
    assert time.monotonic() - started_s < 10
    names = {thread.name for thread in threading.enumerate()}
    assert "camera loop" not in names


def noisy_scene(count: int, moved_at: int | None = None) -> list[np.ndarray]:
    """A still scene with sensor noise; a small thing appears in it at a frame."""
    rng = np.random.default_rng(0)
    scene = rng.integers(40, 200, (144, 256, 3))
    frames = []
    for index in range(count):
        if index == moved_at:
            scene[60:84, 100:124] = 255
        frames.append(np.clip(scene + rng.normal(0, 3, scene.shape), 0, 255).astype(np.uint8))
    return frames


STILLNESS = StillnessOptions(learn_s=0.0, refresh_s=600.0)
EACH = CameraOptions("shade?", every_frame=True, stillness=STILLNESS)


def watch_each(
    scene: list[np.ndarray], options: CameraOptions = EACH
) -> tuple[CameraLoop, ShadeEncoder, ShadeAnswerer, list[CameraAnswer]]:
    """Watch a recording frame by frame, so that what happens does not hang on time."""
    encoder, answerer = ShadeEncoder(), ShadeAnswerer()
    source = source_of(iter(scene), live=False, period_s=0.0)
    loop = CameraLoop([source], encoder, answerer, options)
    return loop, encoder, answerer, answers_of(loop)


def test_a_still_scene_costs_nothing_and_its_answer_stays_equal() -> None:
    _, encoder, answerer, answers = watch_each(noisy_scene(60))
    assert [answer.reused for answer in answers] == [False] + [True] * 59
    assert encoder.calls == answerer.calls == 1
    assert len({answer.answer.text for answer in answers}) == 1
    assert all(answer.encoded.encode_ms == 0 and answer.encoded.kept for answer in answers[1:])


def test_a_small_change_ends_the_reuse() -> None:
    _, _, _, answers = watch_each(noisy_scene(60, moved_at=40))
    assert [a.encoded.queued.index for a in answers if not a.encoded.kept] == [0, 40]


def test_without_reuse_every_frame_is_looked_at() -> None:
    _, encoder, answerer, _ = watch_each(noisy_scene(9), replace(EACH, reuse=False))
    assert encoder.calls == answerer.calls == 9


def test_an_answer_that_broke_its_form_is_counted_and_tried_again() -> None:
    class Breaks(ShadeAnswerer):
        def answer(self, *arguments: Any) -> Answer:
            said = super().answer(*arguments)
            return replace(said, finish="broken_form") if self.calls < 3 else said

    answerer = Breaks()
    source = source_of(iter(noisy_scene(9)), live=False, period_s=0.0)
    loop = CameraLoop([source], ShadeEncoder(), answerer, EACH)
    assert [answer.reused for answer in answers_of(loop)] == [False] * 3 + [True] * 6
    assert answerer.calls == 3
    assert loop.errors == {"answer of another form": 2}


def test_another_question_about_a_still_scene_is_asked() -> None:
    source = source_of(iter(noisy_scene(60)), live=False, period_s=0.0)
    loop = CameraLoop([source], ShadeEncoder(), ShadeAnswerer(), EACH)
    texts = []
    for item in loop.answers():
        if item.reused:
            loop.ask("colour?")
        texts.append(item.answer.text)
    assert texts[0].startswith("shade?")
    assert texts[-1].startswith("colour?")


def test_on_change_answers_only_changes() -> None:
    options = replace(EACH, on_change=True)
    loop, encoder, _, answers = watch_each(noisy_scene(60, moved_at=40), options)
    assert [answer.encoded.queued.index for answer in answers] == [0, 40]
    assert loop.drops == {"unchanged": 58}
    assert encoder.calls == 2


def test_an_empty_question_is_refused() -> None:
    with pytest.raises(OptionError, match="question is empty"):
        CameraOptions("  ")
    loop = CameraLoop([source_of(numbered(0))], ShadeEncoder(), ShadeAnswerer(), ALWAYS_LOOK)
    with pytest.raises(OptionError, match="question is empty"):
        loop.ask("")
