"""Small disks that can be filled, and folders that cannot be written, whoever runs the tests."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of this size at `folder`; takes root's rights."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root's rights")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave no space."""
    path = disk / "filler"
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            return path


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within this context no file of this process can grow over so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Within this context nothing in `folder` can be changed."""
    if os.geteuid():
        every = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
        for path in every:
            path.chmod(0o555)
        try:
            yield
        finally:
            for path in every:
                path.chmod(0o755)
        return
    bind = subprocess.run(["mount", "--bind", str(folder), str(folder)], check=False, capture_output=True)
    if bind.returncode:
        pytest.skip("root can write everywhere here, and cannot mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
