"""Open a source of frames from a text such as `clip.mp4`, `/dev/video0`, `csi:0` or `rtsp://cam/1`."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import parse_qsl

from engines.errors import OptionError, SourceError
from runtime.frames.bag import Bag, is_bag
from runtime.frames.frame import Reader
from runtime.frames.gstreamer import PRESETS, open_gstreamer, pipeline_from_preset
from runtime.frames.live_stream import NETWORK_SCHEMES, open_network_stream, open_v4l2_camera
from runtime.frames.picture_files import PICTURE_SUFFIXES, PictureFiles
from runtime.frames.source import FrameSource, SourceOptions
from runtime.frames.stdin import StdinFrames, StdinStream
from runtime.frames.video_file import VideoFile

KINDS = """\
picture.jpg, folder/          pictures, a folder in the order of its names
clip.mp4                      a video file
/dev/video0, 0                a USB camera; ?video_size=1280x720&framerate=30&input_format=mjpeg
csi:0                         a Jetson's CSI camera; ?width=1280&height=720&fps=30&flip=2
usb-nv:, rtsp-nv:             cameras decoded by a Jetson's hardware; ?location=rtsp://...
gst:PIPELINE                  a GStreamer pipeline without its sink
rtsp://host/path              a network camera; also http, udp, tcp, srt, rtmp
log.bag, log.mcap, bag/       a ROS 1 or 2 bag or an MCAP file; --topic where it has several
-                             standard input, in a format FFmpeg reads
raw:640x480                   standard input, bare RGB frames"""


def open_source(spec: str, options: SourceOptions | None = None) -> FrameSource:
    """Open a camera, a video, a bag or pictures.

    Args:
        spec: what to open; `KINDS` lists the forms.
        options: how it is looked at.

    Raises:
        OptionError: an option is not possible, or has no meaning for this source.
        SourceError: the source cannot be opened.
    """
    topic = options.topic if options is not None else None
    reader = _open_reader(spec.strip(), topic)
    if topic is not None and not isinstance(reader, Bag):
        reader.close()
        raise OptionError(f"{spec} has no topics. Leave --topic out, or give a bag.")
    return FrameSource(reader, options)


def _open_reader(spec: str, topic: str | None) -> Reader:
    head, colon, rest = spec.partition(":")
    if spec == "-" or (colon and head == "raw"):
        return StdinFrames(rest) if colon else StdinStream()
    if colon and head in NETWORK_SCHEMES and rest.startswith("//"):
        return open_network_stream(spec)
    pipeline = _pipeline(spec)
    if pipeline is not None:
        return open_gstreamer(pipeline)
    device, _, query = spec.partition("?")
    if device.isdecimal() or device.startswith("/dev/video"):
        path = f"/dev/video{device}" if device.isdecimal() else device
        return open_v4l2_camera(path, dict(parse_qsl(query)))
    return _open_path(spec, topic)


def _pipeline(spec: str) -> str | None:
    head, colon, rest = spec.partition(":")
    if colon and head == "gst":
        return rest
    if " ! " in spec:
        return spec
    if head not in PRESETS:
        return None
    sensor, _, query = rest.partition("?")
    values = dict(parse_qsl(query))
    if sensor:
        values["id"] = sensor
    return pipeline_from_preset(head, values)


def _open_path(spec: str, topic: str | None) -> Reader:
    try:
        path = Path(spec).expanduser()
        mode = path.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # no such file, name or home
        raise SourceError(
            f"{spec:.300}: there is no such file or device ({getattr(error, 'strerror', error)}). "
            f"A source is one of:\n{KINDS}"
        ) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SourceError(
            f"{path} is a pipe, a socket or a device, expected a file or a folder. What another "
            "program writes can be piped into a source named -, and cameras are /dev/video0 and "
            "so on."
        )
    if not os.access(path, os.R_OK):
        raise SourceError(f"{path} may not be read by this user. Change its permissions.")
    if is_bag(path):
        return Bag(path, topic)
    if path.is_dir() or path.suffix.lower() in PICTURE_SUFFIXES:
        return PictureFiles(path)
    return VideoFile(path)
