"""Saving and loading that cannot half-happen: fingerprints, atomic replacement, strict safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from memory_adapters.decoder import find_decoder

__all__ = [
    "adapter_tensors",
    "atomic_directory",
    "base_fingerprint",
    "check_fingerprint",
    "read_metadata",
    "read_tensors",
    "set_adapter_tensors",
    "tokenizer_fingerprint",
    "write_tensors",
]

_FILE_DTYPES = ("F64", "F32", "BF16", "F16")
_STAGING = ".memory-adapters-staging-"
_COMMITTED = ".memory-adapters-committed"
_PROBE = "The quick brown fox: 1234.56 + (x_1 != y2)\n\tnaïve café, Grüße, Ελλάδα, Привет, 你好，안녕하세요, नमस्ते! 🙂"


def base_fingerprint(model: nn.Module, layers_path: str | None = None) -> dict[str, Any]:
    """What identifies a base model, whatever precision it is loaded in.

    Only signs of weights are hashed: they survive a change between float32, bfloat16 and float16. Quantised weights
    are left out, so a quantised copy of a base has the embeddings' hash alone in common with it.

    Returns:
        `model_type`, `hidden_size`, `num_layers`, `embeddings` (SHA-256 of the signs of every 16th of the first 1,024
        embedding rows) and `blocks` (SHA-256 of the signs of the first row of every floating matrix of the first and
        last block; None if there is none).
    """
    decoder = find_decoder(model, layers_path)
    with align_module_device(decoder.embeddings):
        rows = _plain(decoder.embeddings).weight[:1024:16]
        embeddings = _sign_hash([rows])
    first_rows: list[torch.Tensor] = []
    for block in (decoder.blocks[0], decoder.blocks[-1]):
        for module in _base_modules(block):
            with align_module_device(module):
                weight = getattr(module, "weight", None)
                if not isinstance(weight, torch.Tensor) or type(weight.data) is not torch.Tensor:  # torchao's
                    continue
                if weight.ndim == 2 and weight.dtype in _FLOATS:
                    first_rows.append(weight[0].detach().cpu())
    return {
        "model_type": model.config.model_type,  # type: ignore[union-attr]
        "hidden_size": decoder.hidden_size,
        "num_layers": decoder.num_layers,
        "embeddings": embeddings,
        "blocks": _sign_hash(first_rows) if first_rows else None,
    }


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _plain(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _base_modules(block: nn.Module) -> Iterator[nn.Module]:
    """Modules of a block that are the base model's own, in order; adapters around or inside them are left out."""
    for child in block.children():
        if not isinstance(child, BaseTunerLayer):
            yield child
            yield from _base_modules(child)
        elif (base := child.get_base_layer()) is not child:
            yield base


def _sign_hash(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(torch.signbit(tensor.detach()).to("cpu", torch.uint8).contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the token ids of a fixed multilingual text: what the tokenizer does, not what it is called."""
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def check_fingerprint(saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compare the fingerprint in a file with that of the model at hand; fields that either side lacks pass.

    Raises:
        ValueError: Naming the first field that differs, and both values.
    """
    for key, value in found.items():
        other = saved.get(key)
        if value is not None and other is not None and value != other:
            what = "tokenizer" if key == "tokenizer" else "base model"
            raise ValueError(
                f"This memory belongs to another {what}: its `{key}` is {other}, the one given has {value}. "
                f"Load the {what} it was written with."
            )


@contextmanager
def atomic_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write files into that replace those of `directory` together, once the block ends without error.

    Killed before the commit, `directory` keeps its previous files; killed after it, the next `recover` (every load
    and save calls it) finishes the move. Other files in `directory` stay.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"`{target}` is a file; give a folder to save into.")
    target.mkdir(parents=True, exist_ok=True)
    recover(target)
    staging = Path(tempfile.mkdtemp(prefix=f"{_STAGING}{os.getpid()}-", dir=target))
    try:
        yield staging
        for file in staging.iterdir():
            _sync(file)
        os.rename(staging, target / _COMMITTED)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _sync(target)
    recover(target)


def recover(directory: Path) -> None:
    """Finish a committed save that was interrupted, and clear what a killed one left."""
    committed = directory / _COMMITTED
    if committed.is_dir():
        for file in committed.iterdir():
            os.replace(file, directory / file.name)
        committed.rmdir()
        _sync(directory)
    for staging in directory.glob(f"{_STAGING}*"):
        if not _alive(int(staging.name.removeprefix(_STAGING).partition("-")[0])):
            shutil.rmtree(staging, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors under PEFT's checkpoint names (without the adapter's name)."""
    # Not the whole model's state dict: bitsandbytes' 4-bit layers on a CPU compute otherwise once asked for theirs.
    every = chain(model.named_parameters(), model.named_buffers())
    own = {name: tensor.detach() for name, tensor in every if adapter_name in name.split(".")}
    return get_peft_model_state_dict(model, state_dict=own, adapter_name=adapter_name, save_embedding_layers=False)


@torch.no_grad()
def set_adapter_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put into an adapter what `adapter_tensors` gave of one with the same settings.

    PEFT would ask for the whole model's state dict, which changes what bitsandbytes' 4-bit layers compute on a CPU.
    """
    for name, own in chain(model.named_parameters(), model.named_buffers()):
        parts = name.split(".")
        if adapter_name in parts:
            parts.remove(adapter_name)
            own.copy_(tensors[".".join(parts)])


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file with their SHA-256 in its metadata. The same tensors give the same bytes."""
    exact = torch.contiguous_format
    plain = {name: tensor.detach().cpu().clone(memory_format=exact) for name, tensor in tensors.items()}
    data = to_bytes(plain, metadata={"format": "pt", "sha256": _digest(plain), **(metadata or {})})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors writes them in any order
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def read_metadata(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes by name, and the metadata, of a safetensors file, from its header alone.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"`{path}` is damaged ({error}). Save or download it again.") from error


def read_tensors(path: Path, expected: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Read a safetensors file that must hold exactly the tensors that its config announces.

    Args:
        path: The file.
        expected: Name to shape. Checked against the header before any tensor is read.

    Raises:
        ValueError: If the file is damaged, or its names, shapes, dtypes, hash or values are not as expected.
    """
    remedy = "Save or download the memory again."
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
                raise ValueError(f"`{path}` does not fit its config: missing {missing}, unexpected {extra}. {remedy}")
            for name, shape in expected.items():
                part = file.get_slice(name)
                if list(part.get_shape()) != list(shape) or part.get_dtype() not in _FILE_DTYPES:
                    raise ValueError(
                        f"`{path}`: `{name}` is {part.get_dtype()} {part.get_shape()}, its config announces floats "
                        f"of shape {list(shape)}. {remedy}"
                    )
            tensors = {name: file.get_tensor(name) for name in expected}
            digest = (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise ValueError(f"`{path}` is damaged ({error}). {remedy}") from error
    if digest is not None and digest != _digest(tensors):
        raise ValueError(f"`{path}` was altered after it was saved: its tensors do not match their hash. {remedy}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{path}`: `{name}` holds NaN or infinity. {remedy}")
    return tensors
