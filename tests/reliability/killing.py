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

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "fcntl.flock", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Kill(Protocol):
    """When a child dies."""

    def arm(self) -> None:
        """In the child, before the operation."""

    def watch(self, child: int) -> None:
        """In the parent, after the fork."""


def counting(root: Path, reached: Callable[[int], None]) -> None:
    """Call `reached(n)` before the n-th call of this process that changes something under `root`, or locks a folder."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if not opens and event not in CHANGES:
            return
        if event != "fcntl.flock" and str(root) not in str(arguments[0]):
            return
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
    """Run an operation in a child that is killed; whether that happened before it had ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            kill.arm()
            operation()
            os.write(writer, b"done")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    kill.watch(child)
    _, status = os.waitpid(child, 0)
    done = os.read(reader, 4) == b"done"
    os.close(reader)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ)
    if not died and status:
        raise AssertionError(f"the operation failed by itself (status {status})")
    return not done


def measured(operation: Callable[[], object], root: Path) -> tuple[int, float]:
    """How many calls change something under `root` in a run that nobody kills, and its seconds."""
    reader, writer = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            last = [0]
            counting(root, lambda n: last.__setitem__(0, n + 1))
            operation()
            os.write(writer, str(last[0]).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - start
    calls = int(os.read(reader, 20) or 0)
    os.close(reader)
    assert status == 0, "the operation fails without being killed"
    return calls, seconds
