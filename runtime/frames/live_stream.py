"""Read cameras and network streams with FFmpeg: V4L2 devices, RTSP, HTTP, UDP.

Frames are stamped with the time they were decoded. Buffering is turned off, because a robot has no
use for an old frame.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from engines.errors import SourceError
from runtime.frames.decoding import captures_of, open_container
from runtime.frames.frame import Capture, ReadErrors
from runtime.frames.reconnect import Reconnecting

NETWORK_SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt"})

_LOW_DELAY = {"fflags": "nobuffer", "flags": "low_delay"}
_TIMEOUT_S = 5.0


class LiveStream:
    """One connection to a camera."""

    live = True

    def __init__(
        self, name: str, target: str, format: str | None, options: Mapping[str, str]
    ) -> None:
        """Connect.

        Raises:
            SourceError: nobody answers, or there is no video.
        """
        self.name = name
        self._closed = threading.Event()
        self._container = open_container(
            name, target, format=format, options=options, timeout_s=_TIMEOUT_S
        )

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield pictures until the connection is lost."""
        return captures_of(self._container, errors, self._closed.is_set, wall_clock=True)

    def close(self) -> None:
        """Stop after the read in progress, which takes 5 s at most."""
        self._closed.set()


def open_network_stream(address: str) -> Reconnecting:
    """Open an RTSP, HTTP or other network stream that is connected again when it is lost.

    Raises:
        SourceError: the first connection fails.
    """
    options = dict(_LOW_DELAY)
    if address.startswith("rtsp"):
        options["rtsp_transport"] = "tcp"  # UDP loses packets and shows grey smears
    return Reconnecting(lambda: LiveStream(without_password(address), address, None, options))


def open_v4l2_camera(device: str, options: Mapping[str, str] | None = None) -> Reconnecting:
    """Open a USB camera, for example ``/dev/video0``, that may be unplugged and come back.

    Args:
        device: path of the device.
        options: FFmpeg's v4l2 options: ``video_size``, ``framerate``, ``input_format``.

    Raises:
        SourceError: there is no such device, or it gives no pictures.
    """
    known = {"video_size", "framerate", "input_format"}
    if unknown := sorted(set(options or {}) - known):
        raise SourceError(
            f"{device}: {', '.join(unknown)} is not an option of a V4L2 camera. Those are "
            f"{', '.join(sorted(known))}."
        )
    given = {**_LOW_DELAY, **(options or {})}
    return Reconnecting(lambda: LiveStream(device, device, "v4l2", given))


def without_password(address: str) -> str:
    """Return an address fit for logs: ``rtsp://user:secret@host`` loses its ``user:secret@``."""
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"
