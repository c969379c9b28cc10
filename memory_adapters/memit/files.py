"""The files of a saved edit: its adapter, and whether what lies beside it belongs to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from memory_adapters.base_model.decoder import Decoder
from memory_adapters.files.names import CONFIG_FILE, PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.strict_json import file_in, read_json
from memory_adapters.files.tensors import read_metadata, read_tensors
from memory_adapters.memit.config import MemitConfig
from memory_adapters.memit.covariance import Covariance
from memory_adapters.memit.projection import mlp_projection
from memory_adapters.validation import check_number, shown

__all__ = ["adapter_shapes", "check_adapter_config", "edit_digest", "read_adapter", "read_covariance"]


def adapter_shapes(config: MemitConfig, decoder: Decoder, rank: int) -> dict[str, torch.Size]:
    """Return names and shapes of the tensors of the LoRA that an edit is."""
    names, shapes = config.projection_names(decoder), {}
    for layer, width in config.widths(decoder).items():
        shapes[f"{PEFT_KEY_PREFIX}{names[layer]}.lora_A.weight"] = torch.Size((rank, width))
        shapes[f"{PEFT_KEY_PREFIX}{names[layer]}.lora_B.weight"] = torch.Size((decoder.hidden_size, rank))
    return shapes


def read_covariance(folder: Path, config: MemitConfig, decoder: Decoder) -> Covariance | None:
    """Return the covariance beside a saved edit; None if there is none, or one of another model or other blocks."""
    if not (folder / Covariance.file).is_file():
        return None
    found = Covariance.load(file_in(folder, Covariance.file))
    own, widths = config.base_fingerprint or {}, config.widths(decoder)
    alike = bool(found.base_fingerprint.get("embeddings")) and all(
        own.get(key) in (value, None) or value is None for key, value in found.base_fingerprint.items()
    )
    sizes = {layer: len(matrix) for layer, matrix in found.matrices.items()}
    return found if alike and all(sizes.get(layer) == width for layer, width in widths.items()) else None


def read_adapter(folder: Path, config: MemitConfig, decoder: Decoder) -> dict[str, Tensor]:
    """Return the tensors of an edit's LoRA that was saved without a ledger.

    Raises:
        ValueError: If it is a LoRA on other matrices, which is no edit.
    """
    found = read_json(folder / CONFIG_FILE)
    check_number("r", rank := found.get("r"), low=1, integer=True)
    shapes = adapter_shapes(config, decoder, rank)
    held = read_metadata(folder / WEIGHTS_FILE)[0]
    transposed = mlp_projection(decoder, config.resolved(decoder)[0]).transposed
    if set(held) != set(shapes) or found.get("fan_in_fan_out", False) is not transposed:
        raise ValueError(
            f"`{folder}` holds a LoRA on other matrices than the output projections of the MLPs of some blocks: it is "
            "no memory. Load it with PEFT (`model.load_adapter(...)`)."
        )
    return read_tensors(folder / WEIGHTS_FILE, shapes)


def edit_digest(weights: str, facts: Sequence[Mapping[str, str]]) -> str:
    """Return the SHA-256 of what the ledger was saved with: the adapter's digest and the facts."""
    return hashlib.sha256(json.dumps([weights, facts], sort_keys=True).encode()).hexdigest()


def check_adapter_config(path: Path, rank: int, names: Collection[str]) -> None:
    """Raise a `ValueError` unless plain PEFT would place the adapter where, and as strongly as, `load_memory` does."""
    found = read_json(path)
    found = found if isinstance(found, dict) else {}
    targets = found.get("target_modules")
    given = sorted(map(str, targets)) if isinstance(targets, list) else targets
    expected = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(names)}
    for field, value in expected.items():
        own = given if field == "target_modules" else found.get(field)
        if own != value:
            raise ValueError(
                f"`{path}` is not of the edit beside it: its `{field}` is {shown(own)}, the edit's {shown(value)}. "
                "Save or download the memory again."
            )
