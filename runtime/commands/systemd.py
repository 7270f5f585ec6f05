"""Tell systemd that a service is ready, by the datagram that sd_notify(3) describes."""

from __future__ import annotations

import os
import socket


def tell_systemd(state: str) -> bool:
    """Send a line such as ``READY=1`` to the service manager that started this process.

    Returns:
        Whether there is one that wants to know: a unit with ``Type=notify``.

    Raises:
        OSError: its socket is gone.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):  # in the abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), address)
    return True
