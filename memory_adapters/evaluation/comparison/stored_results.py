"""Results kept in a folder, so that what takes hours goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from memory_adapters.training.distributed import is_main_process

__all__ = ["KeptResults", "digest"]

NO_SETTINGS = {"progress", "disable_tqdm", "peft_version"}  # what changes no result
SHOWN = 3


class KeptResults:
    """Results by name, a JSON file each, that count only for the settings they were measured with.

    Args:
        folder: Where they are; made if need be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def file(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe=' ')}.json"

    def read(self, name: str, settings: Mapping[str, Any]) -> Any:
        """What `keep` was given, or None if there is nothing of that name.

        Raises:
            ValueError: If it was measured with other settings, or its file is damaged.
        """
        file = self.file(name)
        if not file.is_file():
            return None
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            there, result = held["settings"], held["result"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"`{file}` is damaged: delete it, and it is measured again.") from None
        now, then = dict(_flat(plain(settings))), dict(_flat(there))
        other = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        if other:
            differ = ", ".join(f"{key} ({then.get(key)!r} there, {now.get(key)!r} now)" for key in other[:SHOWN])
            raise ValueError(
                f"`{file}` was measured with other settings: {differ}. Give another `folder`, or delete the file to "
                "measure it again."
            )
        return result

    def keep(self, name: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a result. A file that is there is replaced at once, or kept if this is interrupted."""
        if not is_main_process():
            return
        file = self.file(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        held = {"settings": plain(settings), "result": result}
        unfinished.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(file)


def digest(value: Any) -> str:
    """SHA-256 of `value` as `plain` gives it."""
    return hashlib.sha256(json.dumps(plain(value)).encode()).hexdigest()


def plain(value: Any) -> Any:
    """`value` as JSON gives it back, without what changes no result; what JSON has no form of is written out."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        named = {str(key): plain(one) for key, one in value.items() if key not in NO_SETTINGS}
        return dict(sorted(named.items()))
    if isinstance(value, (set, frozenset)):
        return sorted(plain(one) for one in value)
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return json.loads(json.dumps(value)) if value is None or isinstance(value, (str, int, float)) else str(value)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The parts of nested mappings by dotted name."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}" if name else key)
    else:
        yield name, value
