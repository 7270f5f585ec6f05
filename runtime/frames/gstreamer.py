"""Read GStreamer pipelines, above all for Jetson's CSI cameras and hardware decoders.

The pipeline runs in `gst-launch-1.0`, a process of its own. A driver that crashes ends that process
and not the robot's, and it is started again. Frames come over a pipe as YUV4MPEG2, which says its
own size; GStreamer's Python bindings are not needed.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, cast

from engines.errors import SourceError
from runtime.frames.decoding import captures_of, open_container
from runtime.frames.frame import Capture, ReadErrors
from runtime.frames.reconnect import Reconnecting

# y4menc 1.22 also writes the padding of rows whose width is not a multiple of 8. Such a picture is
# scaled to the nearest width that is; others pass through.
_TAIL = (
    "videoconvert ! videoscale ! "
    "video/x-raw,format=I420,colorimetry=bt601,width=[8,16384,8],height=[2,16384,2] ! "
    "y4menc ! fdsink fd=1 sync=false"
)
_STDERR_CHARACTERS = 2000


@dataclass(frozen=True)
class Preset:
    """A pipeline that people look up again and again.

    Attributes:
        pipeline: with ``{placeholders}``.
        defaults: what the placeholders are when the user does not say.
        summary: one line for ``--help``.
    """

    pipeline: str
    defaults: Mapping[str, str]
    summary: str


PRESETS: Mapping[str, Preset] = {
    "csi": Preset(
        "nvarguscamerasrc sensor-id={id} ! "
        "video/x-raw(memory:NVMM),width={width},height={height},framerate={fps}/1,format=NV12 ! "
        "nvvidconv flip-method={flip} ! video/x-raw,format=I420",
        {"id": "0", "width": "1920", "height": "1080", "fps": "30", "flip": "0"},
        "a CSI camera of a Jetson, through its image signal processor",
    ),
    "usb-nv": Preset(
        "v4l2src device={device} ! "
        "image/jpeg,width={width},height={height},framerate={fps}/1 ! "
        "nvv4l2decoder mjpeg=1 ! nvvidconv ! video/x-raw,format=I420",
        {"device": "/dev/video0", "width": "1920", "height": "1080", "fps": "30"},
        "a USB camera whose JPEGs a Jetson decodes in hardware",
    ),
    "rtsp-nv": Preset(
        "rtspsrc location={location} latency={latency} protocols=tcp ! rtph264depay ! h264parse ! "
        "nvv4l2decoder ! nvvidconv ! video/x-raw,format=I420",
        {"location": "rtsp://127.0.0.1:8554/camera", "latency": "100"},
        "an H.264 network camera that a Jetson decodes in hardware",
    ),
}


class GstreamerPipeline:
    """One run of a pipeline."""

    live = True

    def __init__(self, pipeline: str) -> None:
        """Start the pipeline and wait for its first picture.

        Raises:
            SourceError: GStreamer is not installed, or the pipeline gives no pictures.
        """
        self.name = f"gst:{pipeline}"
        self._closed = threading.Event()
        launch = shutil.which("gst-launch-1.0")
        if launch is None:
            raise SourceError(
                f"{self.name} needs gst-launch-1.0, which is not on the path. Run: apt-get install "
                "gstreamer1.0-tools gstreamer1.0-plugins-good"
            )
        self._process = subprocess.Popen(
            [launch, "-q", *split_pipeline(f"{pipeline} ! {_TAIL}", self.name)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._complaint = _LastWords(cast(BinaryIO, self._process.stderr))
        try:
            self._container = open_container(
                self.name, cast(BinaryIO, self._process.stdout), format="yuv4mpegpipe"
            )
        except SourceError as error:
            self.close()
            raise SourceError(
                f"{self.name} gave no pictures. GStreamer says: "
                f"{self._complaint.text() or 'nothing'} "
                "Try the same line with gst-launch-1.0 and fakesink at its end."
            ) from error

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield pictures until the pipeline ends."""
        yield from captures_of(self._container, errors, self._closed.is_set, wall_clock=True)
        if not self._closed.is_set() and self._process.wait() != 0:
            errors.count("pipeline failed", self._complaint.text())

    def close(self) -> None:
        """End the process; nothing is left running."""
        self._closed.set()
        self._process.kill()
        self._process.wait()


class _LastWords:
    """Reads a stream to its end in the background and remembers the last of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._text = ""
        self._thread = threading.Thread(target=self._read, name="gstreamer-errors", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._stream as stream:
            while chunk := stream.read(4096):
                self._text = (self._text + chunk.decode("utf-8", "replace"))[-_STDERR_CHARACTERS:]

    def text(self) -> str:
        """Return what was said, on one line, once the stream has ended or a second is over."""
        self._thread.join(timeout=1.0)
        return " ".join(self._text.split())


def open_gstreamer(pipeline: str) -> Reconnecting:
    """Open a pipeline, without its sink, that is started again when it ends.

    Raises:
        SourceError: it cannot be started.
    """
    return Reconnecting(lambda: GstreamerPipeline(pipeline))


def pipeline_from_preset(name: str, values: Mapping[str, str]) -> str:
    """Return a preset's pipeline with the user's values in it.

    Raises:
        SourceError: the preset does not take one of the values.
    """
    preset = PRESETS[name]
    unknown = sorted(set(values) - set(preset.defaults))
    if unknown:
        raise SourceError(
            f"The preset {name} does not take {', '.join(unknown)}. It takes "
            f"{', '.join(preset.defaults)}: for example "
            f"{name}:?{next(iter(preset.defaults))}={next(iter(preset.defaults.values()))}."
        )
    return preset.pipeline.format(**{**preset.defaults, **values})


def split_pipeline(pipeline: str, name: str) -> list[str]:
    """Split a pipeline into arguments as a shell would, without a shell.

    Raises:
        SourceError: a quote is not closed.
    """
    try:
        return shlex.split(pipeline)
    except ValueError as error:
        raise SourceError(f"{name}: {error}. Close every quote in the pipeline.") from error
