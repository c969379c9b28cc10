"""Break connections on purpose: a server that treats some requests as a `Fault` says."""

from __future__ import annotations

import re
import socket
import struct
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event
from typing import Any

__all__ = ["Fault", "Server"]


class Server(ThreadingHTTPServer):
    """Serve requests, and print nothing if a client is gone."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@dataclass
class Fault:
    """A connection that breaks in the middle of a file, or before it.

    Attributes:
        method: Of the requests.
        path: Regular expression that is found in their paths.
        after: Bytes that still pass: of the content that the client sends (POST, PUT), or else of the reply's.
        times: How many requests it happens to, from the next on.
        reset: Break off with a TCP reset, instead of ending the connection in order.
        hold: Keep the connection open, and silent, until `release`; then end it.
        reached: Set once it has happened to a request.
        released: Set by `release`.
    """

    method: str
    path: str
    after: int = 0
    times: int = 1
    reset: bool = False
    hold: bool = False
    reached: Event = field(default_factory=Event, repr=False)
    released: Event = field(default_factory=Event, repr=False)

    def strikes(self, method: str, path: str) -> bool:
        """Return whether the fault happens to this request, and count the request."""
        if self.times < 1 or method != self.method or not re.search(self.path, path):
            return False
        self.times -= 1
        return True

    def release(self) -> None:
        """End the fault: nothing more happens to any request, and held connections are closed."""
        self.times = 0
        self.released.set()

    def read(self, handler: BaseHTTPRequestHandler, length: int) -> None:
        """Read as much of the request's content as is let through."""
        handler.rfile.read(min(length, self.after) if self.method in ("POST", "PUT") else length)

    def write(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        """Send as much of the reply's content as is let through."""
        handler.wfile.write(content[: self.after])
        handler.wfile.flush()

    def end(self, handler: BaseHTTPRequestHandler) -> None:
        """Close the connection."""
        self.reached.set()
        if self.hold:
            self.released.wait()
        handler.close_connection = True
        if self.reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        else:
            handler.connection.shutdown(socket.SHUT_RDWR)
