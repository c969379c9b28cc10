"""Files from elsewhere: bounded before they are read, checked before they are believed, never executed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from memory_adapters.config import cut

__all__ = ["file_in", "parse_json", "read_json", "read_metadata", "read_tensors", "tensors_digest"]

JSON_BYTES = 1 << 26
HEADER_BYTES = 1 << 24
DEPTH = 16
_FILE_DTYPES = ("F64", "F32", "BF16", "F16")
_LARGEST = torch.finfo(torch.float32).max
_REMEDY = "Save or download it again."


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text in UTF-8, read by the letter of the standard.

    Raises:
        ValueError: If it is not JSON, nested deeper than 16, or holds what other programs read otherwise or not at all:
            NaN, infinity, a name twice in one object, half of a surrogate pair.
    """
    try:
        value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_unique)
        level = [value]
        for _ in range(DEPTH):
            level = [inner for outer in level for inner in _inside(outer)]
        if level:
            raise ValueError(f"nested deeper than {DEPTH}")
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError(f"nested deeper than {DEPTH}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def file_in(folder: Path, name: str) -> Path:
    """The file of this name in a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is a link that leads out of the folder (other than into the Hub's cache).
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"`{folder}` has no {name}: it is not what was saved, or only part of it.")
    home, real = folder.resolve(), path.resolve()
    cache = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if real.parent not in (home, cache):
        raise ValueError(f"`{path}` is a link to `{real}`, outside of its folder: put a copy of that file there.")
    return path


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file of at most 64 MiB.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is longer, or as `parse_json`.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > JSON_BYTES:
            raise ValueError(f"`{path}` has {size:,} bytes, and at most {JSON_BYTES:,} are read. {_REMEDY}")
        data = file.read()
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"`{path}` is not valid JSON ({error}). {_REMEDY}") from error


def read_metadata(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes by name, and the metadata, of a safetensors file, from its header alone.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged.
    """
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"`{path}` is damaged ({cut(str(error))}). {_REMEDY}") from error


def _check_header(path: Path) -> None:
    """What safetensors leaves open: a header of modest length, in which no name stands twice."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, HEADER_BYTES):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}; at most {HEADER_BYTES:,} are read")
        parse_json(file.read(length))


def read_tensors(path: Path, expected: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Read a safetensors file that must hold exactly the tensors that its config announces.

    Args:
        path: The file.
        expected: Name to shape. Checked against the header before any tensor is read.

    Returns:
        Name to tensor, in memory of its own: what becomes of the file afterwards does not reach it.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged, or its names, shapes, dtypes, hash or values are not as expected.
    """
    read_metadata(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
                raise ValueError(
                    f"`{path}` does not fit its config: missing {_few(missing)}, unexpected {_few(extra)}. {_REMEDY}"
                )
            for name, shape in expected.items():
                part = file.get_slice(name)
                if list(part.get_shape()) != list(shape) or part.get_dtype() not in _FILE_DTYPES:
                    raise ValueError(
                        f"`{path}`: `{name}` is {part.get_dtype()} {part.get_shape()}, its config announces floats "
                        f"of shape {list(shape)}. {_REMEDY}"
                    )
            tensors = {name: file.get_tensor(name).clone() for name in expected}  # else a view of the file
            digest = (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise ValueError(f"`{path}` is damaged ({cut(str(error))}). {_REMEDY}") from error
    if digest is not None and digest != tensors_digest(tensors):
        raise ValueError(f"`{path}` was altered after it was saved: its tensors do not match their hash. {_REMEDY}")
    for name, tensor in tensors.items():
        low, high = tensor.aminmax() if tensor.numel() else (0, 0)
        if not (low >= -_LARGEST and high <= _LARGEST):
            raise ValueError(f"`{path}`: `{name}` holds NaN or infinity, or what is too large for float32. {_REMEDY}")
    return tensors


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and numbers, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _few(names: list[str]) -> str:
    return cut(f"{names}") if len(names) <= 8 else f"{cut(str(names[:8]))} and {len(names) - 8:,} more"
