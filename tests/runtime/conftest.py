"""Sources that the tests write themselves: videos, bags, messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import Bundle, open_bundle

Shades = list[int]


def grey_image(shade: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.full((height, width, 3), shade, np.uint8)


@pytest.fixture(scope="session")
def budgets_bundle(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint with vision graphs of 6 and 12 visual tokens, of 16 patches."""
    from export.build.plan import BuildOptions
    from export.build.steps import build_bundle

    out = tmp_path_factory.mktemp("budgets") / "bundle"
    build_bundle(BuildOptions(str(language_checkpoint), out, tokens=(6, 12)))
    return open_bundle(out)


@pytest.fixture
def write_video(tmp_path: Path) -> Callable[..., Path]:
    """Write a video of one grey picture per shade, at 10 frames per second."""
    av = pytest.importorskip("av")

    def write(shades: Shades, name: str = "clip.mp4", codec: str = "mpeg4", **size: int) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.width, stream.height = size.get("width", 64), size.get("height", 48)
            for shade in shades:
                image = grey_image(shade, stream.width, stream.height)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture
def write_bag(tmp_path: Path) -> Callable[..., Path]:
    """Write a ROS 2 bag; messages are (topic, time in ns, type, fields)."""
    pytest.importorskip("rosbags")
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_HUMBLE)

    def write(messages: list[tuple[str, int, object]], storage: str = "mcap") -> Path:
        path = tmp_path / f"bag_{storage}"
        plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
        with Writer(path, version=9, storage_plugin=plugin) as writer:
            connections = {}
            for topic, time_ns, message in messages:
                kind = message.__msgtype__  # type: ignore[attr-defined]
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, kind, typestore=store)
                writer.write(connections[topic], time_ns, store.serialize_cdr(message, kind))
        return path

    return write


@pytest.fixture
def make_message() -> Callable[..., object]:
    """Make an Image message of ROS 2 from its fields."""
    pytest.importorskip("rosbags")
    from rosbags.typesys import Stores, get_typestore

    types = get_typestore(Stores.ROS2_HUMBLE).types

    def make(
        data: np.ndarray | bytes,
        encoding: str = "rgb8",
        stamp_ns: int = 0,
        **fields: int,
    ) -> object:
        header = types["std_msgs/msg/Header"](
            stamp=types["builtin_interfaces/msg/Time"](
                sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9
            ),
            frame_id="camera",
        )
        if isinstance(data, bytes):
            return types["sensor_msgs/msg/CompressedImage"](
                header=header, format=encoding, data=np.frombuffer(data, np.uint8)
            )
        height, step = data.shape[0], data.reshape(data.shape[0], -1).view(np.uint8).shape[1]
        return types["sensor_msgs/msg/Image"](
            header=header,
            height=height,
            width=fields.get("width", data.shape[1]),
            encoding=encoding,
            is_bigendian=fields.get("is_bigendian", 0),
            step=fields.get("step", step),
            data=np.ascontiguousarray(data).view(np.uint8).ravel(),
        )

    return make
