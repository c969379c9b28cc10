"""The edit as PEFT's LoRA layers hold it: two thin factors whose rank is the number of subjects."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from memory_adapters.memit.ledger import Factors
from memory_adapters.peft_layers.layers import lora_linears

__all__ = ["set_lora_factors"]


@torch.no_grad()
def set_lora_factors(
    layers: Mapping[int, LoraLayer], adapter_name: str, config: LoraConfig, factors: Mapping[int, Factors]
) -> None:
    """Let the adapter be B A at each layer, in float32 (a change of B A k that bfloat16 would round away counts).

    Args:
        layers: Block index to LoRA layer.
        adapter_name: The adapter.
        config: Its PEFT config, which gets the new rank.
        factors: Block index to the factors. Rank 0 becomes rank 1 of zeros, the least that PEFT knows.

    Raises:
        ValueError: If a factor holds NaN or infinity; nothing is changed then.
    """
    ready = {}
    for index, layer in layers.items():
        A, B = factors[index].A, factors[index].B
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise ValueError(
                f"The edit of block {index} is too large for float32: raise `regularization` or `shrinkage`."
            )
        if len(A) == 0:
            A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
        device = lora_linears(layer, adapter_name)[0].weight.device
        own = [matrix.to(device).clone(memory_format=torch.contiguous_format) for matrix in (A, B)]  # aligned
        ready[index] = [nn.Parameter(matrix, requires_grad=False) for matrix in own]
    for index, layer in layers.items():
        A, B = ready[index]
        down, up = lora_linears(layer, adapter_name)
        down.weight, up.weight = A, B
        config.r = config.lora_alpha = down.out_features = up.in_features = len(A)
        layer.r[adapter_name] = layer.lora_alpha[adapter_name] = len(A)
        layer.scaling[adapter_name] = 1.0
