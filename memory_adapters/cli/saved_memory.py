"""Settings and saved memories, as the command line names them."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from peft import PeftConfig

from memory_adapters import MemitConfig, MemoryAdapterConfig, MemorySlotsConfig
from memory_adapters.cli.run import wrong
from memory_adapters.config import MemoryConfig
from memory_adapters.files.hub import find_files
from memory_adapters.files.names import CONFIG_FILES
from memory_adapters.files.tensors import read_metadata
from memory_adapters.inject import read_config

__all__ = ["CONFIGS", "METHODS", "MethodName", "SavedMemory", "parsed_settings", "with_settings", "write_options"]

MethodName: TypeAlias = Literal["residual", "memit", "slots"]
CONFIGS: dict[str, type[MemoryConfig]] = {
    "residual": MemoryAdapterConfig,
    "memit": MemitConfig,
    "slots": MemorySlotsConfig,
}
METHODS = {config: name for name, config in CONFIGS.items()}


def write_options(method: str, progress: bool) -> dict[str, Any]:
    """Arguments of `write` that show or hide its bars."""
    return {"training_args": {"disable_tqdm": not progress}} if method == "residual" else {"progress": progress}


def parsed_settings(config_class: type[MemoryConfig], pairs: Sequence[str]) -> dict[str, Any]:
    """`field=value` pairs as keyword arguments of a config; a value is JSON or, if it is not, a string."""
    shared = {"base_fingerprint", "writes", *(field.name for field in fields(PeftConfig))}
    known = [field.name for field in fields(config_class) if field.repr and field.name not in shared]
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise wrong("--set", f"{pair!r} has no value: write field=value.")
        if name not in known:
            raise wrong("--set", f"{config_class.__name__} has no field `{name}`; it has {', '.join(sorted(known))}.")
        try:
            settings[name] = json.loads(text)
        except ValueError:
            settings[name] = text
    try:
        config_class(**settings)
    except (TypeError, ValueError) as error:
        raise wrong("--set", str(error)) from None
    return settings


@dataclass(frozen=True)
class SavedMemory:
    """A saved memory as its files describe it.

    Attributes:
        folder: Where the files are.
        config: Its config.
    """

    folder: Path
    config: MemoryConfig

    @classmethod
    def find(cls, adapter: str) -> SavedMemory:
        """A folder, or what a repository on the Hub has, downloaded. Raises as `load_memory`."""
        folder = find_files(adapter, revision=None, token=None)
        for name in CONFIG_FILES:
            if (folder / name).is_file():
                return cls(folder, read_config(folder / name))
        raise FileNotFoundError(f"`{folder}` has no {CONFIG_FILES[-1]}: it is not a saved memory, or only part of one.")

    @property
    def method(self) -> str:
        return METHODS[type(self.config)]

    def stored_numbers(self) -> dict[str, int]:
        """Numbers in each of its tensor files."""
        files = sorted(self.folder.glob("*.safetensors"))
        return {file.name: sum(map(math.prod, read_metadata(file)[0].values())) for file in files}


@contextmanager
def with_settings(saved: SavedMemory, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder of a saved memory, with other settings in its config."""
    if not settings:
        yield saved.folder
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in saved.folder.iterdir():
            if file.is_file():
                _link(file.resolve(), folder / file.name)
        config = next(folder / name for name in CONFIG_FILES if (folder / name).is_file())
        values = json.loads(config.read_text(encoding="utf-8")) | settings
        config.unlink()
        config.write_text(json.dumps(values), encoding="utf-8")
        yield folder


def _link(file: Path, place: Path) -> None:
    """The same file at another place; a copy on another disk."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
