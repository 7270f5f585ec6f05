"""Hostile ROS messages, videos, bags and raw streams, for `runtime.frames`."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
from PIL import Image

from engines.errors import SourceError
from runtime.frames import Frame, FrameSource, open_source
from runtime.frames.decoding import image_from_video_frame, import_av
from runtime.frames.frame import Capture, ReadErrors
from runtime.frames.ros_image import image_from_compressed_message, image_from_message, stamp_ns
from runtime.frames.stdin import StdinFrames, StdinStream
from runtime.picture_limits import MAX_PIXELS
from tests.faults.attack import Attack
from tests.faults.mutations import damaged, random_of

_MOST_FRAMES = 200
ENCODINGS = (
    *("rgb8", "bgr8", "8UC3", "rgba8", "bgra8", "mono8", "8UC1", "mono16", "yuv422", "uyvy"),
    *("yuv422_yuy2", "yuyv", "bayer_rggb8", "bayer_bggr8", "bayer_gbrg8", "bayer_grbg8"),
)
_WIDTHS = {"rgb8": 3, "bgr8": 3, "8UC3": 3, "rgba8": 4, "bgra8": 4, "mono8": 1, "8UC1": 1}
_ODD = ("32FC1", "16SC7", "bayer_rggb16", "jpeg", "", "RGB8", "nv21", "\x00", "rgb8" * 1000)
_NUMBERS = (0, -1, 1, 3, 65_535, 65_536, 2**31 - 1, -(2**31), 2**32 - 1, 2**63, 10**30)
_WILD: tuple[Any, ...] = (None, "7", "x", 1.5, float("nan"), float("inf"), True, [3], {}, 10**400)


def bytes_a_pixel(encoding: str) -> int:
    """Return what an encoding takes."""
    fallback = 1 if encoding.startswith("bayer") else 2
    return _WIDTHS.get(encoding, fallback)


class _Messages:
    """A source of one message."""

    name, live = "messages", False

    def __init__(self, convert: Any, message: Any) -> None:
        self._convert, self._message = convert, message

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        yield Capture(stamp_ns(self._message), partial(self._convert, self._message))

    def close(self) -> None:
        """Nothing is open."""


def _message(number: int) -> bytes:
    """Return fields as JSON and the data behind them; a third of the messages are right."""
    rng = random_of("message", number)
    encoding = str(rng.choice(ENCODINGS))
    height, width = (int(each) for each in rng.integers(1, 18, 2))
    step = width * bytes_a_pixel(encoding) + int(rng.integers(3) * rng.integers(5))
    data = rng.bytes(height * step)
    fields: dict[str, Any] = {"height": height, "width": width, "step": step, "is_bigendian": 0}
    fields |= {"encoding": encoding, "sec": 1, "nanosec": int(rng.integers(10**9))}
    if rng.integers(3):
        for _ in range(rng.integers(1, 3)):
            name = str(rng.choice(list(fields)))
            choices = (_NUMBERS, _WILD, _ODD)[rng.integers(3)]
            fields[name] = choices[rng.integers(len(choices))]
        data = (data, data[: len(data) // 2], b"", data * 3)[rng.integers(4)]
    return json.dumps(fields).encode() + b"\n" + data


def message_from(data: bytes) -> Any:
    """Return the message that `_message` wrote."""
    text, _, pixels = data.partition(b"\n")
    fields = json.loads(text)
    stamp = SimpleNamespace(sec=fields.pop("sec"), nanosec=fields.pop("nanosec"))
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp), data=pixels, **fields)


def _probe_message(data: bytes) -> None:
    message = message_from(data)
    _expect_frames_or_errors(FrameSource(_Messages(image_from_message, message)))


def _compressed(number: int) -> bytes:
    rng = random_of("compressed", number)
    buffer = io.BytesIO()
    name = ("JPEG", "PNG", "WEBP", "AVIF")[number % 4]
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 9).convert("RGB").save(buffer, name)
    return damaged(buffer.getvalue(), rng)


def _probe_compressed(data: bytes) -> None:
    stamp = SimpleNamespace(sec=0, nanosec=1)
    header = SimpleNamespace(stamp=stamp)
    message = SimpleNamespace(header=header, format="jpeg", data=np.frombuffer(data, np.uint8))
    _expect_frames_or_errors(FrameSource(_Messages(image_from_compressed_message, message)))


_CONTAINERS = (
    ("clip.mp4", "mpeg4", "yuv420p"),
    ("clip.mkv", "ffv1", "bgr0"),
    ("clip.avi", "mjpeg", "yuvj420p"),
    ("clip.ts", "mpeg2video", "yuv420p"),
    ("clip.mp4", "libx264", "yuv420p"),
    ("clip.webm", "libvpx", "yuv420p"),
    ("clip.mov", "qtrle", "rgb24"),
    ("clip.mkv", "png", "rgb24"),
    ("clip.y4m", "wrapped_avframe", "yuv420p"),
    ("clip.flv", "flv", "yuv420p"),
    ("clip.avi", "rawvideo", "bayer_rggb8"),
    ("clip.mkv", "huffyuv", "yuv422p"),
)


@lru_cache
def _videos() -> tuple[tuple[str, bytes], ...]:
    """Return a short video in several containers and codecs; those that this FFmpeg writes."""
    import_av("the attack")
    videos = []
    with tempfile.TemporaryDirectory() as folder:
        for name, codec, pixel_format in _CONTAINERS:
            path = Path(folder) / name
            try:
                with av.open(str(path), "w") as container:
                    stream: Any = container.add_stream(codec, rate=10)
                    stream.pix_fmt, stream.width, stream.height = pixel_format, 48, 34
                    for shade in (20, 120, 220):
                        grey = np.full((34, 48, 3), shade, np.uint8)
                        grey[8:20, 4 : 4 + shade // 8] = (255, 60, 0)
                        frame = av.VideoFrame.from_ndarray(grey, "rgb24")
                        if pixel_format.startswith("bayer"):
                            frame = av.VideoFrame.from_ndarray(grey[..., 0].copy(), pixel_format)
                        container.mux(stream.encode(frame))
                    container.mux(stream.encode())
            except (av.FFmpegError, ValueError):
                continue
            videos.append((path.suffix, path.read_bytes()))
    return tuple(videos)


def _video(number: int) -> bytes:
    rng = random_of("video", number)
    suffix, data = _videos()[number % len(_videos())]
    return suffix.encode() + b"\n" + damaged(data, rng)


def _probe_file(data: bytes) -> None:
    suffix, _, content = data.partition(b"\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"hostile{suffix.decode()}"
        path.write_bytes(content)
        with open_source(str(path)) as source:
            _expect_frames_or_errors(source)


@lru_cache
def _bags() -> tuple[tuple[str, bytes], ...]:
    """Return a bag of three images in each way that `rosbags` writes."""
    from rosbags.rosbag1 import Writer as Writer1
    from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    pixels = np.arange(8 * 6 * 3, dtype=np.uint8)
    stores = {1: get_typestore(Stores.ROS1_NOETIC), 2: get_typestore(Stores.ROS2_HUMBLE)}

    def image(version: int, second: int) -> Any:
        types = stores[version].types
        stamp = types["builtin_interfaces/msg/Time"](sec=second, nanosec=0)
        numbered = {"seq": 0} if version == 1 else {}
        header = types["std_msgs/msg/Header"](stamp=stamp, frame_id="c", **numbered)
        shape = {"height": 6, "width": 8, "encoding": "rgb8", "is_bigendian": 0, "step": 24}
        return types["sensor_msgs/msg/Image"](header=header, data=pixels, **shape)

    kind, bags = "sensor_msgs/msg/Image", []
    with tempfile.TemporaryDirectory() as name:
        for compression in (None, Writer1.CompressionFormat.BZ2, Writer1.CompressionFormat.LZ4):
            path = Path(name) / f"{compression}.bag"
            writer1 = Writer1(path)
            if compression is not None:
                writer1.set_compression(compression)
            with writer1:
                connection = writer1.add_connection("/c", kind, typestore=stores[1])
                for second in range(3):
                    raw = stores[1].serialize_ros1(image(1, second), kind)
                    writer1.write(connection, second, raw)
            bags.append((".bag", path.read_bytes()))
        for plugin, suffix, zipped in (
            (StoragePlugin.MCAP, ".mcap", False),
            (StoragePlugin.MCAP, ".mcap", True),
            (StoragePlugin.SQLITE3, ".db3", False),
        ):
            folder = Path(name) / f"{suffix[1:]}{zipped}"
            writer = Writer(folder, version=9, storage_plugin=plugin)
            if zipped:
                writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
            with writer:
                connection = writer.add_connection("/c", kind, typestore=stores[2])
                for second in range(3):
                    raw = stores[2].serialize_cdr(image(2, second), kind)
                    writer.write(connection, second, raw)
            (file,) = folder.glob(f"*{suffix}")
            bags.append((suffix, file.read_bytes()))
            if not zipped:
                bags.append((f"/{suffix[1:]}", (folder / "metadata.yaml").read_bytes()))
    return tuple(bags)


def _bag(number: int) -> bytes:
    rng = random_of("bag", number)
    suffix, data = _bags()[number % len(_bags())]
    return suffix.encode() + b"\n" + damaged(data, rng)


def _probe_bag(data: bytes) -> None:
    suffix, _, content = data.partition(b"\n")
    if not suffix.startswith(b"/"):
        _probe_file(data)
        return
    storage = suffix[1:].decode()  # the metadata of a folder is what was damaged
    whole = next(each for kind, each in _bags() if kind == f".{storage}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "metadata.yaml").write_bytes(content)
        (folder / f"{storage}False.{storage}").write_bytes(whole)
        with open_source(str(folder)) as source:
            _expect_frames_or_errors(source)


def _stream(number: int) -> bytes:
    """Return a size and what comes through the pipe; without a size, a video."""
    rng = random_of("stream", number)
    sizes = ("4x4", "0x0", "100000x100000", "4x-4", "4X4", "99999999999x1", "٤x٤", "x", "3x2x1")
    if number % 3:
        return _video(number + 10_000).partition(b"\n")[2].join([b"-\n", b""])
    return str(sizes[rng.integers(len(sizes))]).encode() + b"\n" + rng.bytes(int(rng.integers(200)))


def _probe_stream(data: bytes) -> None:
    size, _, content = data.partition(b"\n")
    pipe = io.BytesIO(content)
    reader = StdinStream(pipe) if size == b"-" else StdinFrames(size.decode(), pipe)
    _expect_frames_or_errors(FrameSource(reader))


_SIZES = ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (3, 3), (5, 7), (7, 5), (4, 9), (17, 33))


@lru_cache
def _pixel_formats() -> tuple[str, ...]:
    import av.video.format

    names = sorted(av.video.format.names)
    return tuple(name for name in names if name not in _hardware(names))


def _hardware(names: list[str]) -> set[str]:
    """Return the formats whose pixels are in a device's memory, of which no frame can be made."""
    found = set()
    for name in names:
        try:
            av.VideoFrame(16, 16, name)
        except (av.FFmpegError, ValueError):
            found.add(name)
    return found


def _pixel_format(number: int) -> bytes:
    width, height = _SIZES[number // len(_pixel_formats())]
    return f"{_pixel_formats()[number % len(_pixel_formats())]} {width} {height}".encode()


def _probe_pixel_format(data: bytes) -> None:
    name, width, height = data.decode().split()
    frame = av.VideoFrame(int(width), int(height), name)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    capture = Capture(0, partial(image_from_video_frame, frame))

    class Once:
        name, live = "frame", False

        def captures(self, errors: ReadErrors) -> Iterator[Capture]:
            yield capture

        def close(self) -> None:
            pass

    _expect_frames_or_errors(FrameSource(Once()))


def _expect_frames_or_errors(source: FrameSource) -> None:
    """Read a source to its end: whole frames, counted errors, and nothing else."""
    frames = 0
    for frame in source:
        _expect_whole(frame)
        frames += 1
        if frames == _MOST_FRAMES:
            break
    if not frames:
        raise SourceError(source.errors.last or "it is empty")


def _expect_whole(frame: Frame) -> None:
    height, width, channels = frame.image.shape
    if frame.image.dtype != np.uint8 or channels != 3 or not 0 < height * width <= MAX_PIXELS:
        raise TypeError(f"{frame.image.dtype}{frame.image.shape} came of it")
    int(np.ascontiguousarray(frame.image).sum())  # touches every byte


ATTACKS = {
    "message": Attack(_message, _probe_message),
    "compressed": Attack(_compressed, _probe_compressed),
    "video": Attack(_video, _probe_file),
    "bag": Attack(_bag, _probe_bag),
    "stream": Attack(_stream, _probe_stream),
    "pixel_format": Attack(_pixel_format, _probe_pixel_format),
}


def pixel_format_cases() -> int:
    """Return how many inputs `pixel_format` has in all."""
    return len(_SIZES) * len(_pixel_formats())
