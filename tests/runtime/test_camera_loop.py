"""The camera loop over doubles: newest frame only, control while running, still scenes."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest

from engines.errors import OptionError
from runtime.camera import CameraLoop, CameraOptions
from runtime.camera_parts import CameraAnswer
from runtime.stillness import StillnessOptions
from tests.runtime.camera_doubles import ShadeAnswerer, ShadeEncoder, numbered, source_of

ALWAYS_LOOK = CameraOptions("shade?", reuse=False)


def answers_of(loop: CameraLoop) -> list[CameraAnswer]:
    return [item for item in loop.answers() if isinstance(item, CameraAnswer)]


def test_each_frame_of_a_recording_in_turn() -> None:
    options = CameraOptions("shade?", every_frame=True, reuse=False)
    loop = CameraLoop(source_of(numbered(20), live=False), ShadeEncoder(), ShadeAnswerer(), options)
    answers = answers_of(loop)
    assert [answer.said.text for answer in answers] == [f"shade? {n}" for n in range(20)]
    assert [answer.seen.arrival.index for answer in answers] == list(range(20))
    assert not loop.drops


def test_only_the_newest_frame_is_answered_and_every_frame_is_accounted_for() -> None:
    encoder, answerer = ShadeEncoder(0.004), ShadeAnswerer(0.004, 0.03)
    loop = CameraLoop(source_of(numbered(200)), encoder, answerer, ALWAYS_LOOK)
    answers = answers_of(loop)
    indices = [answer.seen.arrival.index for answer in answers]
    assert indices == sorted(set(indices))
    assert 3 < len(answers) < 60
    assert loop.frames == 200
    assert len(answers) + sum(loop.drops.values()) == 200
    assert loop.drops["superseded"] > 100
    assert indices[-1] == 199  # the last frame is not lost


def test_encoding_overlaps_decoding_and_begins_just_in_time() -> None:
    encode_s, decode_s = 0.05, 0.15
    encoder, answerer = ShadeEncoder(encode_s), ShadeAnswerer(0.01, decode_s)
    source = source_of(itertools.cycle(numbered(200)), period_s=0.01)
    loop = CameraLoop(source, encoder, answerer, ALWAYS_LOOK)
    assert len(list(itertools.islice(loop.answers(), 10))) == 10
    overlaps = [
        begun
        for begun, done in encoder.busy
        for decoding, decoded in answerer.decoding[2:]  # the first teach how long it takes
        if decoding < begun and begun < decoded
    ]
    assert len(overlaps) >= 5
    # Not at once, which would give an old frame, but in the second half of the decoding.
    for begun in overlaps:
        decoding = max(start for start, _ in answerer.decoding if start < begun)
        assert begun - decoding > 0.4 * decode_s


def test_answers_come_at_the_pace_asked_for() -> None:
    options = CameraOptions("shade?", every_s=0.1, reuse=False)
    source = source_of(itertools.cycle(numbered(200)))
    loop = CameraLoop(source, ShadeEncoder(), ShadeAnswerer(), options)
    started_s = time.monotonic()
    for count, _ in enumerate(loop.answers(), start=1):
        if count == 5:
            break
    assert time.monotonic() - started_s >= 0.4


def test_the_question_changes_and_the_loop_pauses_while_running() -> None:
    loop = CameraLoop(
        source_of(itertools.cycle(numbered(200))), ShadeEncoder(), ShadeAnswerer(), ALWAYS_LOOK
    )
    answers = loop.answers()
    assert next(answers).said.text.startswith("shade?")
    loop.ask("colour?")
    late = list(itertools.islice(answers, 12))  # what was under way had the old question
    assert late[-1].said.text.startswith("colour?")
    loop.pause()
    time.sleep(0.1)
    while not loop._out.empty():
        next(answers)
    frames, silent_until = loop.frames, time.monotonic() + 0.2
    while time.monotonic() < silent_until:
        assert loop._out.empty()
        time.sleep(0.01)
    assert loop.frames > frames  # the source goes on being read
    loop.resume()
    newest = next(answers).seen.arrival.index
    assert newest >= frames
    loop.stop()
    assert list(answers) == []


def test_stop_from_another_thread_ends_everything() -> None:
    source = source_of(itertools.cycle(numbered(200)))
    loop = CameraLoop(source, ShadeEncoder(), ShadeAnswerer(0.0, 30.0), ALWAYS_LOOK)
    threading.Timer(0.2, loop.stop).start()
    started_s = time.monotonic()
    assert list(loop.answers()) == []
    assert time.monotonic() - started_s < 3
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


STILLNESS = StillnessOptions(learn_s=0.1, refresh_s=60.0)


def test_a_still_scene_costs_nothing_and_its_answer_stays_equal() -> None:
    encoder, answerer = ShadeEncoder(), ShadeAnswerer()
    options = CameraOptions("shade?", stillness=STILLNESS)
    source = source_of(iter(noisy_scene(200)), period_s=0.005)
    loop = CameraLoop(source, encoder, answerer, options)
    answers = answers_of(loop)
    reused = [answer for answer in answers if answer.reused]
    assert len(reused) > 20
    assert answerer.calls == len(answers) - len(reused)
    assert encoder.calls <= answerer.calls + loop.drops["stale"]
    last_look = max(answer.seen.arrival.index for answer in answers if not answer.reused)
    after = [answer for answer in answers if answer.seen.arrival.index >= last_look]
    assert len({answer.said.text for answer in after}) == 1
    assert all(answer.seen.encode_ms == 0 and answer.seen.kept for answer in reused)


def test_a_small_change_ends_the_reuse() -> None:
    encoder = ShadeEncoder()
    options = CameraOptions("shade?", stillness=STILLNESS)
    source = source_of(iter(noisy_scene(200, moved_at=150)), period_s=0.005)
    answers = answers_of(CameraLoop(source, encoder, ShadeAnswerer(), options))
    looked = [a.seen.arrival.index for a in answers if not a.seen.kept]
    (late,) = [index for index in looked if index > 100]
    assert 150 <= late < 190


def test_another_question_about_a_still_scene_is_asked() -> None:
    loop = CameraLoop(
        source_of(iter(noisy_scene(300)), period_s=0.005),
        ShadeEncoder(),
        ShadeAnswerer(),
        CameraOptions("shade?", stillness=STILLNESS),
    )
    texts = []
    for item in loop.answers():
        if item.reused:
            loop.ask("colour?")
        texts.append(item.said.text)
    assert texts[0].startswith("shade?")
    assert texts[-1].startswith("colour?")


def test_on_change_answers_only_changes() -> None:
    options = CameraOptions("shade?", on_change=True, stillness=STILLNESS)
    source = source_of(iter(noisy_scene(200, moved_at=150)), period_s=0.005)
    loop = CameraLoop(source, ShadeEncoder(), ShadeAnswerer(), options)
    (late,) = [a.seen.arrival.index for a in answers_of(loop) if a.seen.arrival.index > 100]
    assert 150 <= late < 190
    assert loop.drops["unchanged"] > 40


def test_an_empty_question_is_refused() -> None:
    with pytest.raises(OptionError, match="question is empty"):
        CameraOptions("  ")
    loop = CameraLoop(source_of(numbered(0)), ShadeEncoder(), ShadeAnswerer(), ALWAYS_LOOK)
    with pytest.raises(OptionError, match="question is empty"):
        loop.ask("")
