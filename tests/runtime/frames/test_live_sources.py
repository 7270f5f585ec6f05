"""Cameras: reconnection over a reader made for the test, real GStreamer and real HTTP video."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from engines.errors import SourceError
from runtime.frames import FrameSource, open_source
from runtime.frames.frame import Capture, ReadErrors
from runtime.frames.gstreamer import PRESETS, pipeline_from_preset
from runtime.frames.live_stream import open_v4l2_camera, without_password
from runtime.frames.reconnect import Reconnecting

needs_gstreamer = pytest.mark.skipif(
    shutil.which("gst-launch-1.0") is None, reason="GStreamer is not installed"
)


class Unplugged:
    """Its cable is pulled after three frames, and every other opening fails."""

    name = "loose"
    live = True
    openings = 0

    def __init__(self) -> None:
        cls = type(self)
        cls.openings += 1
        if cls.openings % 2 == 0:
            raise SourceError("no such device")

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        for _ in range(3):
            yield Capture(time.time_ns(), lambda: np.zeros((2, 2, 3), np.uint8))

    def close(self) -> None:
        pass


def test_a_source_that_vanishes_twenty_times_is_opened_again() -> None:
    Unplugged.openings = 0
    source = FrameSource(Reconnecting(Unplugged, first_wait_s=0.0005, longest_wait_s=0.001))
    frames = 0
    for _ in source:
        frames += 1
        if frames == 63:  # 21 connections of three frames
            source.close()
    assert frames == 63
    assert source.errors.counts == {"disconnected": 20, "reconnection failed": 20}


def test_closing_ends_the_wait_for_a_camera_that_never_returns() -> None:
    Unplugged.openings = 0
    source = FrameSource(Reconnecting(Unplugged, first_wait_s=30.0))
    reading = threading.Thread(target=lambda: list(source))
    reading.start()
    time.sleep(0.05)
    source.close()
    reading.join(timeout=5)
    assert not reading.is_alive()


@needs_gstreamer
def test_a_pipeline_gives_its_colours() -> None:
    pytest.importorskip("av")
    pattern = "videotestsrc pattern=solid-color foreground-color=0xffc86432 num-buffers=4"
    with open_source(f"gst:{pattern} ! video/x-raw,width=322,height=240") as source:
        frame = next(iter(source))
    assert frame.image.shape == (240, 320, 3)  # rows whose width y4menc would pad are scaled
    assert frame.image.reshape(-1, 3).min(axis=0) == pytest.approx([200, 100, 50], abs=4)
    assert frame.image.reshape(-1, 3).max(axis=0) == pytest.approx([200, 100, 50], abs=4)
    assert abs(time.time_ns() - frame.timestamp_ns) < 10e9


@needs_gstreamer
def test_a_pipeline_that_ends_is_started_again() -> None:
    pytest.importorskip("av")
    caps = "video/x-raw,width=32,height=32"
    with open_source(f"videotestsrc num-buffers=2 ! {caps}") as source:
        frames = iter(source)
        for _ in range(5):
            next(frames)
        assert source.errors.counts["disconnected"] == 2


@needs_gstreamer
def test_a_pipeline_that_cannot_run_says_what_gstreamer_said() -> None:
    pytest.importorskip("av")
    with pytest.raises(SourceError, match="nosuchelement"):
        open_source("gst:nosuchelement ! identity")


def test_presets_take_the_users_values_and_refuse_others() -> None:
    pipeline = pipeline_from_preset("csi", {"id": "1", "flip": "2"})
    assert "nvarguscamerasrc sensor-id=1 !" in pipeline
    assert "flip-method=2" in pipeline
    assert "width=1920,height=1080,framerate=30/1" in pipeline
    with pytest.raises(SourceError, match="csi does not take exposure"):
        pipeline_from_preset("csi", {"exposure": "1"})
    for name, preset in PRESETS.items():
        assert "{" not in pipeline_from_preset(name, {}), preset.summary


def test_v4l2_options_are_checked_before_the_device() -> None:
    with pytest.raises(SourceError, match=r"zoom is not an option of a V4L2 camera"):
        open_v4l2_camera("/dev/video9", {"zoom": "2"})


def test_a_camera_that_is_not_there() -> None:
    pytest.importorskip("av")
    with pytest.raises(SourceError, match="/dev/video97 cannot be opened"):
        open_source("97")


@pytest.mark.skipif(not Path("/dev/video0").exists(), reason="no V4L2 device, no v4l2loopback")
def test_a_v4l2_device() -> None:
    with open_source("/dev/video0") as source:
        assert next(iter(source)).image.ndim == 3


def test_passwords_stay_out_of_names() -> None:
    assert without_password("rtsp://me:secret@cam:554/a@b") == "rtsp://cam:554/a@b"
    assert without_password("rtsp://cam/stream") == "rtsp://cam/stream"


def test_video_over_http_is_connected_again(
    write_video: Callable[..., Path], tmp_path: Path
) -> None:
    write_video([70] * 5, name="clip.mkv", codec="mjpeg")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}/clip.mkv"
        with open_source(address) as source:
            frames = iter(source)
            shades = [float(next(frames).image.mean()) for _ in range(12)]
            assert source.errors.counts["disconnected"] == 2
    finally:
        server.shutdown()
        server.server_close()
    assert shades == pytest.approx([70] * 12, abs=4)
    with pytest.raises(SourceError, match="cannot be opened as video"):
        open_source(address)
