"""Store results in a folder, so that what takes hours resumes after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from memory_adapters.files.atomic import atomic_file
from memory_adapters.training.distributed import is_main_process

__all__ = ["StoredResults", "digest"]

WITHOUT_EFFECT = {"progress", "measure", "disable_tqdm", "peft_version"}  # settings that change no result
SHOWN = 3


class StoredResults:
    """Store results by name, a JSON file each, that count only for the settings they were measured with.

    Args:
        folder: Where they are; made if need be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def file(self, name: str) -> Path:
        """Return the file of a result."""
        return self.folder / f"{quote(name, safe=' ')}.json"

    def read(self, name: str, settings: Mapping[str, Any]) -> Any:
        """Return what `save` was given, or None if there is nothing of that name.

        Raises:
            ValueError: If it was measured with other settings, or its file is damaged.
        """
        file = self.file(name)
        if not file.is_file():
            return None
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            there, result = stored["settings"], stored["result"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"`{file}` is damaged: delete it, and it is measured again.") from None
        now, then, defaults = (dict(_flat(one)) for one in (plain(settings), there, _defaults(settings)))
        # A setting that is newer than the result had what is its default now.
        then = {key: defaults[key] for key in now if key in defaults} | then
        other = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        if other:
            differ = ", ".join(f"{key} ({then.get(key)!r} there, {now.get(key)!r} now)" for key in other[:SHOWN])
            raise ValueError(
                f"`{file}` was measured with other settings: {differ}. Give another `folder`, or delete the file to "
                "measure it again."
            )
        return result

    def save(self, name: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a result. An existing file is replaced whole, or kept if this is interrupted."""
        if is_main_process():
            stored = {"settings": plain(settings), "result": result}
            with atomic_file(self.file(name)) as staging:
                staging.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def digest(value: Any) -> str:
    """Return the SHA-256 of `value` as `plain` gives it."""
    return hashlib.sha256(json.dumps(plain(value)).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Return `value` as JSON gives it back, without settings that change no result; other objects as their text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        named = {str(key): plain(one) for key, one in value.items() if key not in WITHOUT_EFFECT}
        return dict(sorted(named.items()))
    if isinstance(value, (set, frozenset)):
        return sorted(plain(one) for one in value)
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return json.loads(json.dumps(value)) if value is None or isinstance(value, (str, int, float)) else str(value)


def _defaults(value: Any) -> Any:
    """Return the defaults of the fields of dataclasses, as `plain` gives these."""
    if isinstance(value, Mapping):
        return {str(key): _defaults(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_defaults(one) for one in value]
    if not is_dataclass(value):
        return {}
    return plain({own.name: own.default for own in fields(value) if own.default is not MISSING})


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the parts of nested mappings, and of lists of these, by dotted name."""
    if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        value = {str(place): one for place, one in enumerate(value)}
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}" if name else key)
    else:
        yield name, value
