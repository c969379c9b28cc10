"""The matrices of decoder blocks, and which of them a LoRA can sit on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from memory_adapters.base_model.decoder import Decoder, base_linears, unwrapped

__all__ = ["block_matrices", "lora_shapes", "stored_transposed", "takes_lora"]


def block_matrices(decoder: Decoder, layers: Iterable[int]) -> dict[str, nn.Module]:
    """Return the modules of these blocks that hold a matrix, by full name."""
    return {
        f"{decoder.block_name(layer)}.{path}": module
        for layer in layers
        for path, module in base_linears(decoder.blocks[layer])
        if _weight(module) is not None
    }


def takes_lora(decoder: Decoder, name: str, module: nn.Module) -> bool:
    """Return whether a LoRA can sit on a matrix: not on a router, nor where a fused kernel reads the weight itself."""
    plain = hasattr(module, "in_features") or stored_transposed(module)
    if not plain or type(unwrapped(module)).__module__.startswith("transformers.models."):
        return False
    place, _, own = name.rpartition(".")
    beside_convolution = any(isinstance(child, _ConvNd) for child in decoder.model.get_submodule(place).children())
    return not (beside_convolution and own == "out_proj")


def stored_transposed(module: nn.Module) -> bool:
    """Return whether a matrix is stored (in, out), as GPT-2's Conv1D does."""
    return type(unwrapped(module)).__name__ == "Conv1D"


def lora_shapes(name: str, module: nn.Module, rank: int) -> dict[str, torch.Size]:
    """Return names and shapes of the tensors of a LoRA on a matrix."""
    inputs: int | None = getattr(module, "in_features", None)
    outputs: int = getattr(module, "out_features", 0)
    if inputs is None:
        weight = _weight(module)
        assert weight is not None  # `block_matrices` has matrices alone
        inputs, outputs = weight.shape
    return {
        f"{name}.lora_A.weight": torch.Size((rank, inputs)),
        f"{name}.lora_B.weight": torch.Size((outputs, rank)),
    }


def _weight(module: nn.Module) -> torch.Tensor | None:
    """Return a module's matrix; None if it has none, as an activation or a norm."""
    weight = getattr(unwrapped(module), "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None
