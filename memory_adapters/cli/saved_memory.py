"""Find saved memories, as the command line names them, and change their settings."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_adapters.config import MemoryConfig
from memory_adapters.files.hub import find_files
from memory_adapters.files.names import CONFIG_FILES
from memory_adapters.files.tensors import read_metadata
from memory_adapters.inject import read_config
from memory_adapters.registry import Method, method_of

__all__ = ["SavedMemory", "with_settings"]


@dataclass(frozen=True)
class SavedMemory:
    """Describe a saved memory by its files.

    Attributes:
        folder: Where the files are.
        config: Its config.
    """

    folder: Path
    config: MemoryConfig

    @classmethod
    def find(cls, adapter: str) -> SavedMemory:
        """Find a folder, or download a repository of the Hub. Raises as `load_memory`."""
        folder = find_files(adapter, revision=None, token=None)
        for name in CONFIG_FILES:
            if (folder / name).is_file():
                return cls(folder, read_config(folder / name))
        raise FileNotFoundError(f"`{folder}` has no {CONFIG_FILES[-1]}: it is not a saved memory, or only part of one.")

    @property
    def method(self) -> Method:
        """The method that it is of."""
        method = method_of(self.config)
        assert method is not None  # `read_config` refuses others
        return method

    def stored_numbers(self) -> dict[str, int]:
        """Return how many numbers each of its tensor files holds."""
        files = sorted(self.folder.glob("*.safetensors"))
        return {file.name: sum(map(math.prod, read_metadata(file)[0].values())) for file in files}


@contextmanager
def with_settings(saved: SavedMemory, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folder of a saved memory, or a copy with other settings in its config."""
    if not settings:
        yield saved.folder
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in saved.folder.iterdir():
            if file.is_file():
                _link(file.resolve(), folder / file.name)
        config = next(folder / name for name in CONFIG_FILES if (folder / name).is_file())
        values = json.loads(config.read_text(encoding="utf-8")) | dict(settings)
        config.unlink()
        config.write_text(json.dumps(values), encoding="utf-8")
        yield folder


def _link(file: Path, place: Path) -> None:
    """Link a file to another place, or copy it to another disk."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
