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
from runtime.frames.demosaic import rgb_from_mosaic
from runtime.frames.frame import Capture, ReadErrors
from runtime.picture_limits import MAX_PIXELS, size_problem
from runtime.vision import Pixels

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

_READ_BYTES = 1 << 20
_DECODER_LIMITS = {"max_pixels": str(MAX_PIXELS)}
_PLAYLISTS = frozenset({"hls", "concat", "dash", "sdp", "imf", "image2"})
"""Formats whose files name other files, or addresses, that FFmpeg then opens."""
_ABORTING = "libswscale aborts on grey with alpha in floating point. Convert the video."
_BAD_READS = 100
"""Failed reads in a row after which a stream counts as ended."""


def open_container(
    name: str,
    target: str | BinaryIO,
    *,
    format: str | None = None,
    options: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    self_contained: bool = False,
) -> InputContainer:
    """Open what FFmpeg can read and make sure it has pictures.

    Args:
        name: what errors call it.
        target: a path, an address, or an open stream.
        format: FFmpeg's name of the format, where it cannot be guessed.
        options: FFmpeg's options of that format.
        timeout_s: longest wait for the opening, and for each read.
        self_contained: refuse playlists and the like: what is read is the target alone.

    Raises:
        SourceError: PyAV is not installed, the target cannot be opened, or it has no video.
    """
    av = import_av(name)
    given = {**(options or {}), **_DECODER_LIMITS}
    if self_contained:
        given["format_whitelist"] = ",".join(sorted(av.formats_available - _PLAYLISTS))
        given["protocol_whitelist"] = "file,pipe"
    try:
        container: InputContainer = av.open(
            target,
            format=format,
            options=given,
            timeout=timeout_s,
            buffer_size=_READ_BYTES,
            metadata_errors="replace",
        )
    except Exception as error:  # FFmpeg's, the operating system's, or of a name it cannot take
        reason = getattr(error, "strerror", None) or error
        raise SourceError(
            f"{name} cannot be opened as video: {reason}. Check the path or address, and that "
            "`ffprobe` can read it."
        ) from error
    if not container.streams.video:
        container.close()
        raise SourceError(f"{name} has no video in it. Give a file or stream that has pictures.")
    stream: Any = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise SourceError(f"{name} has video that this FFmpeg cannot decode. Convert it first.")
    stream.thread_type = "AUTO"
    stream.codec_context.options = dict(_DECODER_LIMITS)
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
                    errors.count("read failed", f"{_BAD_READS} packets in a row are corrupt")
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
    """Convert a decoded picture to RGB, turned the way its file says it is to be shown.

    Raises:
        SourceError: it is too large, or a mosaic that is too small.
    """
    if problem := size_problem(picture.width, picture.height):
        raise SourceError(f"a picture of the video has {problem}. Scale the video down.")
    if picture.format.name.startswith("yaf"):
        raise SourceError(f"a picture of the video has {picture.format.name} pixels: {_ABORTING}")
    if picture.format.name.startswith("bayer_"):
        image = _image_from_mosaic(picture)
    else:
        image = picture.to_ndarray(format="rgb24")  # type: ignore[assignment]
    quarter_turns = round(picture.rotation / 90)
    return np.rot90(image, k=quarter_turns) if quarter_turns else image


def _image_from_mosaic(picture: VideoFrame) -> Pixels:
    """Return the picture of a camera that sends what its sensor sees."""
    if min(picture.width, picture.height) < 2:
        raise SourceError(
            f"a Bayer picture of the video has {picture.width} x {picture.height} pixels, expected "
            "at least 2 x 2."
        )
    levels: Any = picture.to_ndarray()  # uint8[H, W] or uint16[H, W]
    if levels.dtype != np.uint8:
        levels = (levels >> 8).astype(np.uint8)
    pattern = picture.format.name.removeprefix("bayer_")[:4]
    return rgb_from_mosaic(levels, pattern)


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
