"""The matrices of decoder blocks, and which of them a LoRA can sit on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from memory_adapters.base_model.decoder import Decoder, base_linears, unwrapped
from memory_adapters.base_model.partial_forward import CACHE

__all__ = ["block_matrices", "lora_shapes", "mixes_tokens", "mlp_matrices", "stored_transposed", "takes_lora"]

# What the `forward` of attention, state spaces and convolutions over tokens takes, and that of an MLP does not.
TOKEN_MIXING = {
    "attention_mask",
    "cache_params",
    "cache_position",
    "layer_past",
    "past_key_value",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "state",
    CACHE,
}
PLAIN_SUBCLASSES = {"FalconLinear"}  # models' own subclasses of `nn.Linear` that compute W x, as routers do not


def block_matrices(decoder: Decoder, layers: Iterable[int]) -> dict[str, nn.Module]:
    """Return the modules of these blocks that hold a matrix, by full name."""
    return {
        f"{decoder.block_name(layer)}.{path}": module
        for layer in layers
        for path, module in base_linears(decoder.blocks[layer])
        if _weight(module) is not None
    }


def mlp_matrices(decoder: Decoder, layers: Iterable[int]) -> dict[str, nn.Module]:
    """Return the matrices of these blocks' MLPs that a LoRA can sit on, by full name; all of a block without any."""
    found: dict[str, nn.Module] = {}
    for layer in layers:
        name, block = decoder.block_name(layer), decoder.blocks[layer]
        every = {path: m for path, m in block_matrices(decoder, [layer]).items() if takes_lora(decoder, path, m)}
        mixers = tuple(f"{name}.{path}." for path, child in block.named_children() if mixes_tokens(unwrapped(child)))
        found |= {path: module for path, module in every.items() if not f"{path}.".startswith(mixers)} or every
    return found


def mixes_tokens(child: nn.Module) -> bool:
    """Return whether a block's child looks at other tokens, as attention does and an MLP does not."""
    return bool(TOKEN_MIXING & set(inspect.signature(child.forward).parameters))


def takes_lora(decoder: Decoder, name: str, module: nn.Module) -> bool:
    """Return whether a LoRA can sit on a matrix: not on a router, nor where a fused kernel reads the weight itself."""
    plain = hasattr(module, "in_features") or stored_transposed(module)
    kind = type(unwrapped(module))
    own = kind.__module__.startswith("transformers.models.") and kind.__name__ not in PLAIN_SUBCLASSES
    if not plain or own:
        return False
    place, _, end = name.rpartition(".")
    beside_convolution = any(isinstance(child, _ConvNd) for child in decoder.model.get_submodule(place).children())
    return not (beside_convolution and end == "out_proj")


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
