"""Find the output projection of a block's MLP: the matrix that MEMIT edits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from memory_adapters.base_model.decoder import Decoder, base_linears, unwrapped

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

    Raises:
        ValueError: If the block is a mixture of experts, or has no matrix onto the stream.
    """
    block = decoder.blocks[layer]
    name = decoder.block_name(layer)
    experts = [n for n, p in block.named_parameters() if p.ndim == 3]
    experts += [n for n, m in block.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if experts:
        raise ValueError(
            f"Block {layer} is a mixture of experts (`{name}.{experts[0]}`), which closed-form editing does not cover: "
            "choose `layers` with a dense MLP, or use MemoryAdapterConfig, which takes any block."
        )
    found = []
    for path, module in base_linears(block):
        weight = getattr(unwrapped(module), "weight", None)
        inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
        transposed = inputs is None and isinstance(weight, torch.Tensor) and weight.ndim == 2
        if transposed:
            assert weight is not None
            inputs, outputs = weight.shape
        if isinstance(inputs, int) and outputs == decoder.hidden_size:
            transposed = transposed or type(unwrapped(module)).__name__ == "Conv1D"
            found.append(Projection(module, f"{name}.{path}", inputs, outputs, transposed))
    if not found:
        raise ValueError(
            f"Block {layer} (`{name}`, {type(block).__name__}) has no matrix onto the residual stream of width "
            f"{decoder.hidden_size}: its MLP cannot be edited in closed form."
        )
    widest = max(projection.in_features for projection in found)
    return [projection for projection in found if projection.in_features == widest][-1]
