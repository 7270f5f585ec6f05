"""The benchmark of clips through bundles: their video files, and its table."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import clip_budgets
from benchmarks.clip_budgets import ALL, ONEVISION, Bench, Result
from runtime.clips.clip import read_clip
from runtime.clips.clip_options import ClipOptions

sys.path.insert(0, str(ONEVISION))

import events
from clip_video import read_pictures
from evaluate import HeldOut, read_held_out


@pytest.fixture
def clips(tmp_path: Path) -> HeldOut:
    events.write_clips(3, 2, tmp_path)
    return read_held_out(tmp_path, "clip")


def test_a_clip_is_read_from_its_video_as_it_was_drawn(
    clips: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_budgets, "_KEPT", tmp_path / "kept")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    bench = Bench(tmp_path, clips, threads=1)
    video = bench._video(clips.paths[1])
    frames = read_clip(str(video), ClipOptions())
    drawn = events.generate_event_clip(3, 1).frames
    np.testing.assert_array_equal([frame.image for frame in frames], drawn)
    np.testing.assert_array_equal(read_pictures(clips.paths[1]), drawn)
    assert bench._video(clips.paths[1]) == video


def test_the_table_compares_with_all_tokens_on_the_same_questions(clips: HeldOut) -> None:
    count = sum(map(len, clips.questions))
    some = [True] * count
    some[0] = False
    results = [
        Result(ALL, None, 2, 289.0, [True] * count),
        Result("scope", 32, 2, 33.0, some),
    ]
    rows = clip_budgets.summary_of(results, clips)["rows"]
    assert rows[0]["exact"] == 1
    assert rows[1]["count"] == count
    low, high = rows[1]["kept"]
    assert low < 1 - 1 / count <= high
    table = clip_budgets.table_of(results, clips)
    assert f"{count} questions about 2 clips" in table
    assert f"| 32 | scope | 33.0 | {1 - 1 / count:.1%} (" in table


def test_nothing_right_has_nothing_to_compare_with(clips: HeldOut) -> None:
    nothing = Result(ALL, None, 2, 289.0, [False] * sum(map(len, clips.questions)))
    assert clip_budgets.summary_of([nothing], clips)["rows"][0]["kept"] is None
