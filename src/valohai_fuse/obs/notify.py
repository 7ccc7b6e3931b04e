"""Tells systemd how a `Type=notify` service is doing: one datagram to the socket it named, and silence where there is none."""

from __future__ import annotations

import socket


def sd_notify(address: str | None, *states: str) -> bool:
    """Sends e.g. `READY=1`; `address` is the value of NOTIFY_SOCKET. True when it was sent; never raises."""
    if not address or address[0] not in "@/":
        return False
    target = "\0" + address[1:] if address[0] == "@" else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(1)
            channel.sendto("\n".join(states).encode(), target)
    except OSError:
        return False
    return True
