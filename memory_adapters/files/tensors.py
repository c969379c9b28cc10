"""Read and write safetensors files. Names, shapes, dtypes, a hash and the values are checked when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from memory_adapters.files.strict_json import SAVE_AGAIN, parse_json
from memory_adapters.validation import cut

__all__ = ["read_metadata", "read_tensors", "tensors_digest", "write_tensors"]

HEADER_BYTES = 1 << 24
_FILE_DTYPES = ("F64", "F32", "BF16", "F16")
_LARGEST = torch.finfo(torch.float32).max


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and their SHA-256 to a safetensors file. The same tensors always give the same bytes."""
    exact = torch.contiguous_format
    plain = {name: tensor.detach().cpu().clone(memory_format=exact) for name, tensor in tensors.items()}
    data = to_bytes(plain, metadata={"format": "pt", "sha256": tensors_digest(plain), **(metadata or {})})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors does not sort it
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def read_metadata(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return shapes by name and the metadata of a safetensors file, reading its header alone.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged.
    """
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"`{path}` is damaged ({cut(str(error))}). {SAVE_AGAIN}") from error


def _check_header(path: Path) -> None:
    """Check what safetensors does not: that the header is short, and has no name twice."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, HEADER_BYTES):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}; at most {HEADER_BYTES:,} are read")
        parse_json(file.read(length))


def read_tensors(
    path: Path, expected: Mapping[str, torch.Size], integers: Container[str] = ()
) -> dict[str, torch.Tensor]:
    """Read a safetensors file that must have exactly the tensors that its config describes.

    Args:
        path: The file.
        expected: Name to shape. The header is compared with it before any tensor is read.
        integers: Names of tensors of int32; the others are floats.

    Returns:
        Name to tensor. Tensors are copies: they do not change with the file.

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
                found = f"missing {_few(missing)}, unexpected {_few(extra)}"
                raise ValueError(f"`{path}` does not match its config: {found}. {SAVE_AGAIN}")
            for name, shape in expected.items():
                part = file.get_slice(name)
                dtypes, kind = (("I32",), "int32") if name in integers else (_FILE_DTYPES, "floats")
                if list(part.get_shape()) != list(shape) or part.get_dtype() not in dtypes:
                    raise ValueError(
                        f"`{path}`: `{name}` is {part.get_dtype()} {part.get_shape()}, but its config describes "
                        f"{kind} of shape {list(shape)}. {SAVE_AGAIN}"
                    )
            tensors = {name: file.get_tensor(name).clone() for name in expected}  # not a view of the file
            digest = (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise ValueError(f"`{path}` is damaged ({cut(str(error))}). {SAVE_AGAIN}") from error
    if digest is not None and digest != tensors_digest(tensors):
        raise ValueError(f"`{path}` was changed after it was saved: its tensors do not match their hash. {SAVE_AGAIN}")
    for name, tensor in tensors.items():
        low, high = tensor.aminmax() if tensor.numel() else (0, 0)
        if not (low >= -_LARGEST and high <= _LARGEST):
            raise ValueError(f"`{path}`: `{name}` has NaN, infinity, or numbers too large for float32. {SAVE_AGAIN}")
    return tensors


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _few(names: list[str]) -> str:
    return cut(f"{names}") if len(names) <= 8 else f"{cut(str(names[:8]))} and {len(names) - 8:,} more"
