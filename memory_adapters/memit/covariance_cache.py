"""Keep the covariances of text sampled from models, so that no process samples the same text again.

A file is used only for the very weights that it was sampled with. It counts as made again where it is damaged or cannot
be read, and is not kept where it cannot be written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.fingerprint import base_fingerprint
from memory_adapters.files.locks import cache_folder
from memory_adapters.memit.covariance import Covariance
from memory_adapters.peft_layers.layers import MemoryLayer, adapter_layers, used_adapters
from memory_adapters.training.distributed import world_size

__all__ = ["cached_covariance", "covariance_file", "keep_covariance"]

MOST_BYTES = 4 << 30  # of all files together
VERSION = 1  # of what is sampled, and how
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def covariance_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    *,
    num_tokens: int,
    seed: int,
    layers_path: str | None,
) -> Path | None:
    """Return where the covariance of text that a model samples as it is now is kept.

    None if it is not: other adapters take part, some weights are elsewhere (offloaded) or their bits cannot be read
    (torchao's), or several processes share the work.
    """
    every = adapter_layers(model)
    reading = [layer for layer in every if not (isinstance(layer, MemoryLayer) and layer.adds_virtual_tokens)]
    if world_size() > 1 or any(used_adapters(layer) for layer in reading):
        return None
    adapters = {id(t) for layer in every for t in _adapter_tensors(layer)}
    base = [t for t in chain(model.parameters(), model.buffers()) if id(t) not in adapters]
    if any(tensor.is_meta or type(tensor.data) is not Tensor for tensor in base):
        return None
    device = model.device.type
    about = {
        "version": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fingerprint": base_fingerprint(model, layers_path),
        "weights": _weights_digest(base),
        "device": device,
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
        "start": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "vocabulary": find_decoder(model, layers_path).vocab_size,
        "layers": list(layers),
        "num_tokens": num_tokens,
        "seed": seed,
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "covariances" / f"{name}.safetensors"


def cached_covariance(file: Path, layers: Sequence[int]) -> Covariance | None:
    """Return the covariance that is kept in a file; None if there is none, or none that can be used."""
    try:
        found = Covariance.load(file)
    except (OSError, ValueError):
        return None
    with suppress(OSError):
        os.utime(file)  # those that were used longest ago are deleted first
    return found if sorted(found.matrices) == sorted(layers) else None


def keep_covariance(file: Path, covariance: Covariance) -> None:
    """Keep a covariance, and delete those that were used longest ago if all take more than 4 GiB.

    A single one that is larger is not kept.
    """
    if sum(4 * matrix.numel() for matrix in covariance.matrices.values()) > MOST_BYTES:
        return
    with suppress(OSError):  # the disk is full, or the folder cannot be written
        covariance.save(file)
        known = sorted(((one.stat().st_mtime, one) for one in file.parent.glob("*.safetensors")), reverse=True)
        total = 0
        for _, one in known:
            total += one.stat().st_size
            if total > MOST_BYTES and one != file:
                one.unlink(missing_ok=True)


def _adapter_tensors(layer: object) -> list[Tensor]:
    assert isinstance(layer, torch.nn.Module)
    own = chain(layer.named_parameters(), layer.named_buffers())
    return [tensor for name, tensor in own if not name.startswith("base_layer.")]


def _weights_digest(tensors: Sequence[Tensor]) -> str:
    """Return a hash that any change of any weight changes, from exact sums of what the bits are as integers."""
    digest = hashlib.sha256()
    for tensor in tensors:
        bits = tensor.detach().contiguous().reshape(-1)
        whole = bits.view(_INTEGERS[bits.element_size()]) if bits.element_size() in _INTEGERS else bits
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} {int(whole.sum(dtype=torch.int64))} ".encode())
        digest.update(whole[:: max(1, len(whole) // 1024)].cpu().numpy().tobytes())
    return digest.hexdigest()
