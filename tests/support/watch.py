"""A watch over what a reader of files does: what it opens, runs and takes."""

from __future__ import annotations

import codecs
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS, SECONDS_A_BYTE = 1.0, 5e-7  # of processor time that reading may take
BYTES, BYTES_A_BYTE = 64 << 20, 36  # of main memory that it may take: JSON that is all empty lists takes this much


class Watch:
    """Lets a reader open files of its folder, and do little else.

    What Python reports of itself (`sys.addaudithook`) is compared with what reading needs: no import, no code compiled
    or run, no pickle, no process, no connection, no file outside of the folder and Python's own.
    """

    FORBIDDEN = re.compile(
        r"(exec|compile|import|marshal\.loads|pickle\.find_class|subprocess\.Popen|os\.(system|exec|fork|posix_spawn|spawn|"
        r"link|symlink|truncate|chmod|chown)|socket\.\w+|ctypes\.(dlopen|dlsym)|code\.__new__|shutil\.\w+)"
    )
    CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir")

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.acts: list[str] = []
        codecs.lookup("utf-8-sig")  # which Python imports once it is needed
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if self.FORBIDDEN.fullmatch(event):
            self.acts.append(f"{event} {args!r:.200}")
        elif event == "open" or event in self.CHANGES:
            for path in args[: 2 if event == "os.rename" else 1]:
                if isinstance(path, str | bytes | os.PathLike) and not self._inside(path):
                    self.acts.append(f"{event} {path!r}")

    def _inside(self, path: Any) -> bool:
        assert self.folder is not None
        found = os.path.abspath(os.fsdecode(path))
        own = found == str(self.folder) or found.startswith((f"{self.folder}/", "/proc/self/"))
        return own or found.endswith(".py")  # whose lines Python shows in tracebacks

    @contextmanager
    def over(self, folder: Path, *, scale: float = 1, size: int = 0) -> Iterator[None]:
        """Within this context, however it ends; `scale` is how much more is allowed, `size` the bytes of the files."""
        folder = folder.resolve()
        self.acts = []
        start, before = time.process_time(), _memory(reset=True)
        self.folder = folder
        try:
            yield
        finally:
            self.folder = None
            took, more = time.process_time() - start, _memory() - before
            assert not self.acts, f"reading did what it must not: {self.acts[:3]}"
            assert took < SECONDS * scale + SECONDS_A_BYTE * size, f"reading took {took:.1f} s"
            assert more < BYTES * scale + BYTES_A_BYTE * size, f"reading took {more >> 20} MiB"


def _memory(reset: bool = False) -> int:
    """Bytes of main memory: the most since the last reset, which makes it what it is now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10
