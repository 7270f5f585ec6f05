"""Pictures, folders, videos and pipes, as files the tests write."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.errors import OptionError, SourceError
from runtime.frames import FrameSource, SourceOptions, open_source
from runtime.frames.stdin import StdinFrames, StdinStream


def shades_of(source: FrameSource) -> list[int]:
    return [round(float(frame.image.mean())) for frame in source]


def test_folder_is_read_in_natural_order_and_a_bad_file_is_counted(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        picture = np.full((4, 5, 3), number * 20, np.uint8)
        Image.fromarray(picture).save(tmp_path / f"frame{number}.png")
    (tmp_path / "frame3.png").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("not for us")
    with open_source(str(tmp_path)) as source:
        assert shades_of(source) == [20, 40, 200]
        assert source.errors.counts == {"undecodable": 1}
        assert not source.live


def test_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no pictures in it"):
        open_source(str(tmp_path))


def test_video_gives_every_frame_with_its_own_time(write_video: Callable[..., Path]) -> None:
    shades = [40, 80, 120, 160, 200]
    with open_source(str(write_video(shades))) as source:
        frames = list(source)
    assert [frame.timestamp_ns for frame in frames] == [n * 100_000_000 for n in range(5)]
    assert [round(float(frame.image.mean())) for frame in frames] == pytest.approx(shades, abs=4)
    assert frames[0].image.shape == (48, 64, 3)
    assert frames[0].image.dtype == np.uint8


def test_corrupt_packets_are_counted_and_the_rest_is_read(
    write_video: Callable[..., Path],
) -> None:
    path = write_video([100] * 20, name="clip.avi", codec="mjpeg")
    data = bytearray(path.read_bytes())
    starts = [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 20
    for at in (starts[3], starts[7], starts[8]):
        data[at : at + 600] = b"\x00" * 600
    path.write_bytes(data)
    with open_source(str(path)) as source:
        shades = shades_of(source)
    assert shades == pytest.approx([100] * 17, abs=4)
    assert sum(source.errors.counts.values()) == 3


def test_a_truncated_video_ends_early_without_an_error(write_video: Callable[..., Path]) -> None:
    path = write_video([100] * 20, name="clip.avi", codec="mjpeg")
    path.write_bytes(path.read_bytes()[:8000])
    with open_source(str(path)) as source:
        assert 0 < len(shades_of(source)) < 20


def test_what_is_no_video_is_refused_with_the_path(tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"hello" * 100)
    with pytest.raises(SourceError, match=r"clip\.mp4 cannot be opened as video"):
        open_source(str(path))


def test_a_missing_file_is_told_with_what_could_be_typed() -> None:
    with pytest.raises(SourceError, match="no such file or device") as told:
        open_source("nowhere.mp4")
    assert "rtsp://host/path" in str(told.value)


def test_topic_is_refused_where_there_are_none(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(OptionError, match="has no topics"):
        open_source(str(tmp_path / "a.png"), SourceOptions(topic="/camera"))


def test_bare_frames_from_a_pipe_and_a_piece_at_the_end() -> None:
    frames = np.arange(2 * 4 * 6 * 3, dtype=np.uint8)
    reader = StdinFrames("6x4", io.BytesIO(frames.tobytes() + b"half"))
    source = FrameSource(reader)
    pictures = [frame.image for frame in source]
    np.testing.assert_array_equal(np.stack(pictures).ravel(), frames)
    assert source.errors.counts == {"cut short": 1}


@pytest.mark.parametrize("size", ["", "640", "0x4", "axb"])
def test_a_pipe_of_bare_frames_must_say_its_size(size: str) -> None:
    with pytest.raises(SourceError, match="expected WIDTHxHEIGHT"):
        StdinFrames(size)


def test_a_pipe_in_a_known_format(write_video: Callable[..., Path]) -> None:
    path = write_video([90] * 3, name="clip.mkv", codec="mjpeg")
    source = FrameSource(StdinStream(io.BytesIO(path.read_bytes())))
    assert shades_of(source) == pytest.approx([90] * 3, abs=4)
    assert source.live
