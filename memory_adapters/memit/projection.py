"""Find the output projection of a block's MLP: the matrix that MEMIT edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from memory_adapters.base_model.decoder import Decoder, base_linears, unwrapped
from memory_adapters.base_model.matrices import mixes_tokens

__all__ = ["Projection", "mlp_projection"]


@dataclass(frozen=True)
class Projection:
    """Store the last matrix of a block's MLP, whose input is the key and whose output joins the residual stream.

    Attributes:
        module: The linear module (or the adapter layer around it).
        name: Its dotted name in the model, such as `"model.layers.7.mlp.down_proj"`.
        in_features: Width d_in of the keys.
        out_features: Width of what it adds to the stream.
        transposed: Whether its weight is stored (in, out), as GPT-2's Conv1D does.
    """

    module: nn.Module
    name: str
    in_features: int
    out_features: int
    transposed: bool


def mlp_projection(decoder: Decoder, layer: int) -> Projection:
    """Locate the output projection of the MLP of block `layer`: the matrix onto the stream with the widest input.

    Attention and its kin (linear attention, state spaces, convolutions) project onto the stream too; they are told from
    an MLP by what their `forward` takes: a mask, a cache or positions. In a mixture of experts it is that of the shared
    expert, which every token goes through.

    Raises:
        ValueError: If the block is a mixture of experts without a shared one, or has no MLP with a matrix onto the
            stream.
    """
    block = decoder.blocks[layer]
    name = decoder.block_name(layer)
    mixers = [path for path, child in block.named_children() if mixes_tokens(unwrapped(child))]
    found, experts = [], _experts(block, mixers)
    for path, module in base_linears(block):
        weight = getattr(unwrapped(module), "weight", None)
        inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
        transposed = inputs is None and isinstance(weight, torch.Tensor) and weight.ndim == 2
        if transposed and experts:
            continue  # a router, which has a plain parameter
        if transposed:
            assert weight is not None
            inputs, outputs = weight.shape
        if isinstance(inputs, int) and outputs == decoder.hidden_size and not _within(path, [*mixers, *experts]):
            transposed = transposed or type(unwrapped(module)).__name__ == "Conv1D"
            found.append(Projection(module, f"{name}.{path}", inputs, outputs, transposed))
    if not found and experts:
        raise ValueError(
            f"Block {layer} is a mixture of experts (`{name}.{experts[0]}`) without a shared one: which experts a "
            "subject goes through changes with the text before it, so no single matrix can be edited in closed form. "
            "Choose `layers` with a dense MLP or a shared expert, or use GatedLoraConfig or MemoryAdapterConfig, which "
            "take any block."
        )
    if not found:
        raise ValueError(
            f"Block {layer} (`{name}`, {type(block).__name__}) has no MLP with a matrix onto the residual stream of "
            f"width {decoder.hidden_size}: it cannot be edited in closed form. Choose `layers` with an MLP, or use "
            "MemoryAdapterConfig, which takes any block."
        )
    widest = max(projection.in_features for projection in found)
    return [projection for projection in found if projection.in_features == widest][-1]


def _experts(block: nn.Module, mixers: Sequence[str]) -> list[str]:
    """Return the paths of what only a mixture of experts has: modules of 3-D parameters, and lists of MLPs."""
    own = [(path, module) for path, module in block.named_modules() if not _within(path, mixers)]
    return [
        path
        for path, module in own
        if (isinstance(module, nn.ModuleList) and len(module) > 1)
        or (not isinstance(module, _ConvNd) and any(p.ndim == 3 for p in module.parameters(recurse=False)))
    ]


def _within(path: str, modules: Sequence[str]) -> bool:
    """Return whether a path is that of one of some modules, or of a part of one."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)
