"""Decode a container with FFmpeg, through PyAV, into captures.

Video files, USB cameras, network streams, GStreamer pipelines and standard input all come here. A
packet that cannot be decoded, or a picture the decoder marks as damaged, is counted and skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from engines.errors import SourceError
from runtime.frames.frame import Capture, ReadErrors
from runtime.vision import Pixels

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

_READ_BYTES = 1 << 20
_BAD_READS = 100
"""Failed reads in a row after which a stream counts as ended."""


def open_container(
    name: str,
    target: str | BinaryIO,
    *,
    format: str | None = None,
    options: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> InputContainer:
    """Open what FFmpeg can read and make sure it has pictures.

    Args:
        name: what errors call it.
        target: a path, an address, or an open stream.
        format: FFmpeg's name of the format, where it cannot be guessed.
        options: FFmpeg's options of that format.
        timeout_s: longest wait for the opening, and for each read.

    Raises:
        SourceError: PyAV is not installed, the target cannot be opened, or it has no video.
    """
    av = import_av(name)
    try:
        container: InputContainer = av.open(
            target,
            format=format,
            options=dict(options or {}),
            timeout=timeout_s,
            buffer_size=_READ_BYTES,
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(
            f"{name} cannot be opened as video: {reason}. Check the path or address, and that "
            "`ffprobe` can read it."
        ) from error
    if not container.streams.video:
        container.close()
        raise SourceError(f"{name} has no video in it. Give a file or stream that has pictures.")
    container.streams.video[0].thread_type = "AUTO"
    return container


def captures_of(
    container: InputContainer,
    errors: ReadErrors,
    closed: Callable[[], bool],
    *,
    wall_clock: bool,
) -> Iterator[Capture]:
    """Yield the pictures of the first video stream until it ends.

    Args:
        container: an open container; it is closed at the end.
        errors: where errors are counted.
        closed: says when to stop.
        wall_clock: stamp with the time of reading (cameras) and not with the stream's own time.
    """
    av = import_av(errors.source)
    stream = container.streams.video[0]
    bad_reads = 0
    try:
        packets = container.demux(stream)
        while not closed():
            try:
                packet = next(packets)
                pictures = packet.decode()
                bad_reads = 0
            except StopIteration:
                return
            except av.EOFError:
                return
            except av.InvalidDataError as error:
                errors.count("corrupt packet", error)
                bad_reads += 1
                if bad_reads == _BAD_READS:
                    return
                continue
            except (av.FFmpegError, OSError) as error:
                errors.count("read failed", error)
                return
            for picture in pictures:
                if picture.is_corrupt:
                    errors.count("corrupt picture", "the decoder marked a picture as damaged")
                    continue
                timestamp_ns = time.time_ns() if wall_clock else _stream_time_ns(picture)
                yield Capture(timestamp_ns, partial(image_from_video_frame, picture))
    finally:
        container.close()


def image_from_video_frame(picture: VideoFrame) -> Pixels:
    """Convert a decoded picture to RGB, turned the way its file says it is to be shown."""
    image: Pixels = picture.to_ndarray(format="rgb24")  # type: ignore[assignment]
    quarter_turns = round(picture.rotation / 90)
    return np.rot90(image, k=quarter_turns) if quarter_turns else image


def import_av(wanted_by: str) -> Any:
    """Import PyAV.

    Raises:
        SourceError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise SourceError(
            f"{wanted_by} needs PyAV, which is not installed. Run: pip install 'foveate[video]'"
        ) from error
    av.logging.set_level(av.logging.PANIC)  # errors are counted, not printed by FFmpeg
    return av


def _stream_time_ns(picture: VideoFrame) -> int:
    if picture.pts is None or picture.time_base is None:
        return 0
    return int(picture.pts * picture.time_base * 1_000_000_000)
