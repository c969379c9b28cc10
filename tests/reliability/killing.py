"""Running an operation in a forked process that is killed: at a file-system call, in the middle of a file, at any time.

What was imported before the fork is there in every child, so a child costs milliseconds.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Kill(Protocol):
    """When a child dies."""

    def arm(self) -> None:
        """In the child, before the operation."""

    def watch(self, child: int) -> None:
        """In the parent, after the fork."""


def counting(root: Path, reached: Callable[[int], None]) -> None:
    """Call `reached(n)` before the n-th call of this process that changes something under `root`."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if (opens or event in CHANGES) and str(root) in str(arguments[0]):
            count += 1
            reached(count - 1)

    sys.addaudithook(hook)


@dataclass
class AtCall:
    """Before the n-th call that changes a file or folder under `root`."""

    number: int
    root: Path

    def arm(self) -> None:
        counting(self.root, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == self.number else None)

    def watch(self, child: int) -> None:
        """The child does it."""


@dataclass
class InFile:
    """In the middle of the first file that is longer than so many bytes."""

    size: int

    def arm(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))

    def watch(self, child: int) -> None:
        """The kernel does it."""


@dataclass
class AtTime:
    """At a random time within so many seconds."""

    seconds: float
    random: random.Random

    def arm(self) -> None:
        """The parent does it."""

    def watch(self, child: int) -> None:
        time.sleep(self.random.uniform(0, self.seconds))
        os.kill(child, signal.SIGKILL)


def killed(operation: Callable[[], object], kill: Kill) -> bool:
    """Run an operation in a child that is killed, and return whether that happened before it had ended."""

    def run() -> str:
        kill.arm()
        operation()
        return "done"

    child, reader = fork(run)
    kill.watch(child)
    status, said = ended(child, reader)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ)
    assert died or not status, f"the operation failed by itself (status {status})"
    return said != "done"


def measured(operation: Callable[[], object], root: Path) -> tuple[int, float]:
    """Return how many calls change something under `root` in a run that nobody kills, and its seconds."""

    def run() -> str:
        last = [0]
        counting(root, lambda n: last.__setitem__(0, n + 1))
        operation()
        return str(last[0])

    start = time.perf_counter()
    status, said = ended(*fork(run))
    assert status == 0, "the operation fails without being killed"
    return int(said), time.perf_counter() - start


def fork(run: Callable[[], str]) -> tuple[int, int]:
    """Run a function in a forked process that sends what it returns; its id and the pipe."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            os.write(writer, run().encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    return child, reader


def ended(child: int, reader: int) -> tuple[int, str]:
    """Wait for a forked process; its status and what it sent."""
    _, status = os.waitpid(child, 0)
    said = os.read(reader, 100).decode()
    os.close(reader)
    return status, said
