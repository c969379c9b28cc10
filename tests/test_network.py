"""Importing reaches for no network and warns of nothing; tests are kept from what is beyond this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import pytest

from tests.support.network import attempts, check

IMPORT = """
from tests.support.network import attempts, refuse_the_network
refuse_the_network()
import memory_adapters, memory_adapters.cli, memory_adapters.files.hub
assert not attempts, attempts
print("imported")
"""


@pytest.mark.integration
def test_import_uses_no_network_and_warns_of_nothing() -> None:
    # torch 2.6 leaves a temporary folder to the end of the process
    command = [sys.executable, "-W", "error", "-W", "ignore:Implicitly cleaning up", "-c", IMPORT]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == "imported"


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("socket.connect", (None, ("192.0.2.1", 443))),
        ("socket.connect", (None, ("2001:db8::1", 443, 0, 0))),
        ("socket.sendto", (None, ("10.0.0.1", 53))),
        ("socket.getaddrinfo", ("example.com", 443, 0, 0, 0)),
        ("socket.getaddrinfo", (b"example.com", 443, 0, 0, 0)),
        ("socket.gethostbyname", ("example.com",)),
    ],
)
def test_connections_beyond_this_machine_are_refused(event: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(ConnectionRefusedError, match="beyond this machine"):
        check(event, arguments)
    assert attempts.pop().startswith(event)


def test_the_loopback_interface_and_unix_sockets_are_not() -> None:
    with socket.create_server(("localhost", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        socket.create_connection(server.getsockname()[:2]).close()
        thread.join()
    for host in (("::1", 80, 0, 0), ("127.8.9.1", 80), "/run/some.socket"):
        check("socket.connect", (None, host))
    assert not attempts


def test_the_hook_is_in_place() -> None:
    with pytest.raises(ConnectionRefusedError, match="getaddrinfo"):
        socket.getaddrinfo("nowhere.invalid", 443)
    assert attempts.pop() == "socket.getaddrinfo nowhere.invalid"
