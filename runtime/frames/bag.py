"""Read ROS 1 and 2 bags and MCAP files with `rosbags`, without ROS."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import SourceError
from runtime.frames.frame import Capture, ReadErrors
from runtime.frames.ros_image import image_from_compressed_message, image_from_message, stamp_ns

if TYPE_CHECKING:
    from rosbags.highlevel import AnyReader
    from rosbags.interfaces import Connection

_MOST_METADATA_BYTES = 4_000_000
"""Of `metadata.yaml`, which is read by a slow parser; real ones have kilobytes."""
_MOST_LISTED = 20

BAG_SUFFIXES = frozenset({".bag", ".mcap", ".db3"})

_CONVERSIONS = {
    "sensor_msgs/msg/Image": image_from_message,
    "sensor_msgs/msg/CompressedImage": image_from_compressed_message,
}


class Bag:
    """One image topic of a bag, stamped with the time in the messages' headers."""

    live = False

    def __init__(self, path: Path, topic: str | None = None) -> None:
        """Open the bag and find the topic.

        Args:
            path: a ``.bag``, ``.mcap`` or ``.db3`` file, or the folder of a ROS 2 bag.
            topic: its name, or the type of its messages; None where there is only one.

        Raises:
            SourceError: the bag is damaged, or it does not have exactly one such topic.
        """
        self._closed = threading.Event()
        self._reader = _open_reader(path)
        try:
            self._connections = _choose_topic(path, self._reader.connections, topic)
        except SourceError:
            self._reader.close()
            raise
        self.name = f"{path}:{self._connections[0].topic}"
        self.length: int | None = sum(connection.msgcount for connection in self._connections)

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield the topic's messages in the order they were recorded."""
        try:
            messages = self._reader.messages(self._connections)
            while not self._closed.is_set():
                try:
                    connection, recorded_ns, data = next(messages)
                except StopIteration:
                    return
                except Exception as error:  # rosbags raises whatever its decompressors do
                    errors.count("read failed", f"the rest of the bag cannot be read: {error!r}")
                    return
                try:
                    message: Any = self._reader.deserialize(data, connection.msgtype)
                    taken_ns = stamp_ns(message) or recorded_ns
                except Exception as error:  # a bag may define its own, other, image messages
                    errors.count("corrupt message", repr(error))
                    continue
                yield Capture(taken_ns, partial(_CONVERSIONS[connection.msgtype], message))
        finally:
            self._reader.close()

    def close(self) -> None:
        """Stop before the next message."""
        self._closed.set()


def is_bag(path: Path) -> bool:
    """Say whether a path looks like a bag."""
    return path.suffix.lower() in BAG_SUFFIXES or (path / "metadata.yaml").is_file()


def _open_reader(path: Path) -> AnyReader:
    try:
        from rosbags.highlevel import AnyReader
        from rosbags.typesys import Stores, get_typestore
    except ImportError as error:
        raise SourceError(
            f"{path} needs rosbags, which is not installed. Run: pip install 'foveate[ros]'"
        ) from error
    _refuse_what_is_no_recording(path)
    try:
        # Bags of older ROS 2 releases hold no message definitions; image types never changed.
        reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_HUMBLE))
        reader.open()
    except Exception as error:  # a damaged bag fails in its YAML, SQLite, MCAP or zstd reader
        raise SourceError(
            f"{path} cannot be opened as a bag: {error or repr(error)}. A recording that was cut "
            "off can be repaired with `ros2 bag reindex`, `rosbag reindex` or `mcap recover`."
        ) from error
    return reader


def _refuse_what_is_no_recording(path: Path) -> None:
    """Refuse a folder that holds a pipe or a device, or more metadata than a recording has."""
    for file in path.iterdir() if path.is_dir() else ():
        if not (file.is_file() or file.is_dir()):
            raise SourceError(
                f"{file} is not a regular file, expected the files of a bag. Take it out."
            )
        if file.name == "metadata.yaml" and file.stat().st_size > _MOST_METADATA_BYTES:
            raise SourceError(
                f"{file} has {file.stat().st_size:,} bytes, expected at most "
                f"{_MOST_METADATA_BYTES:,}. Write it anew with `ros2 bag reindex`."
            )


def _choose_topic(
    path: Path, connections: list[Connection], wanted: str | None
) -> list[Connection]:
    images = [connection for connection in connections if connection.msgtype in _CONVERSIONS]
    matching = [
        connection
        for connection in images
        if wanted is None
        or wanted in (connection.topic, connection.msgtype)
        or wanted == connection.msgtype.replace("/msg/", "/")
    ]
    topics = {connection.topic for connection in matching}
    if len(topics) == 1:
        return matching
    listed = ", ".join(
        f"{connection.topic} ({connection.msgtype}, {connection.msgcount} messages)"
        for connection in images[:_MOST_LISTED]
    )
    if len(images) > _MOST_LISTED:
        listed += f" and {len(images) - _MOST_LISTED} more"
    what = "no image topic" if wanted is None else f"no image topic {wanted!r}"
    if topics:
        what = f"{len(topics)} image topics" + ("" if wanted is None else f" of type {wanted}")
    raise SourceError(
        f"{path} has {what}, expected one. It has: {listed or 'no image topics at all'}. "
        "Choose one with --topic."
    )
