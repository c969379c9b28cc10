"""No test reaches beyond this machine: what would connect elsewhere, or ask for another's address, is refused."""

from __future__ import annotations

import ipaddress
import socket
import sys
from typing import Any

__all__ = ["attempts", "check", "refuse_the_network"]

attempts: list[str] = []  # also of what somebody caught


def refuse_the_network() -> None:
    """From now on, and for the rest of the process: an audit hook cannot be taken away."""
    sys.addaudithook(check)


def check(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook.

    Raises:
        ConnectionRefusedError: If a socket is to reach beyond the loopback interface.
    """
    host = None
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        host = arguments[1][0]  # of a Unix socket it is a path
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    if host is not None and not _is_here(host.decode() if isinstance(host, bytes) else host):
        attempts.append(f"{event} {host}")
        raise ConnectionRefusedError(f"Tests do not reach beyond this machine, but {event} was called for {host!r}.")


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost", socket.gethostname())
