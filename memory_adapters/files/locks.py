"""Lock folders between the threads and processes of one user on one machine.

Lock files are in the user's cache, not in the folders: a saved memory consists of its own files alone, and a read-only
folder can be locked too.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

__all__ = ["cache_folder", "folder_lock", "user_id"]


def cache_folder() -> Path:
    """Return the folder for what can be made again: `$MEMORY_ADAPTERS_CACHE`, or `~/.cache/memory-adapters`."""
    return Path(os.environ.get("MEMORY_ADAPTERS_CACHE") or Path.home() / ".cache" / "memory-adapters")


def folder_lock(folder: Path) -> FileLock:
    """Return the one lock of a folder. A thread that holds it may take it again; others wait."""
    name = hashlib.sha256(os.fsencode(os.path.normcase(os.path.realpath(folder)))).hexdigest()
    return FileLock(_lock_folder() / f"{name}.lock", is_singleton=True)


def user_id() -> int:
    """Return the id of the user, as `os.stat` gives it for the owner of a file."""
    return os.getuid() if hasattr(os, "getuid") else 0  # on Windows it gives 0 for every file


def _lock_folder() -> Path:
    with suppress(OSError, RuntimeError):  # the user has no home, or a read-only one
        folder = cache_folder() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"memory-adapters-locks-{user_id()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != user_id():  # who could have put links in it
        raise PermissionError(f"`{folder}` is another user's: set MEMORY_ADAPTERS_CACHE to a folder of yours.")
    return folder
