"""The values of things at one block: a few hidden units for each, which act where a row is open to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from memory_adapters.keys.gate import KeyReader
from memory_adapters.keys.thing_memory import Values
from memory_adapters.residual_mlp.config import MemoryAdapterConfig

__all__ = ["ThingMLP", "TrainedUnits"]


@dataclass(frozen=True)
class TrainedUnits:
    """Store which thing acts in each row of a batch while things are trained.

    Attributes:
        values: What is trained at this block.
        owners: Index in them of each row's thing (rows,).
        mask: Where it acts (rows, tokens), bool; None for everywhere.
    """

    values: Values
    owners: Tensor
    mask: Tensor | None


class ThingMLP(nn.Module):
    """Compute what the things that rows are open to add to the residual stream at one block.

    At a token that is open to thing t, it is rms(x) · W_down,t · act(W_up,t · n(x)).

    Attributes:
        inner: W_up of all things (things, units, hidden_size).
        outer: W_down of all things (things, hidden_size, units).
        trained: What acts in place of what is written, while things are trained.
    """

    has_keys = False  # of its own: they are read at another block

    def __init__(self, hidden_size: int, config: MemoryAdapterConfig) -> None:
        super().__init__()
        things, units = len(config.things), config.units
        self.activation = ACT2FN[config.activation]
        self.inner = nn.Parameter(torch.zeros(things, units, hidden_size))
        self.outer = nn.Parameter(torch.zeros(things, hidden_size, units))
        self.trained: TrainedUnits | None = None

    def read_by(self, reader: KeyReader, adapter_name: str) -> None:
        """Tell which layer knows where rows are open."""
        vars(self)["gate"] = (reader, adapter_name)  # in a tuple, so that the reader is no child of this one

    @property
    def values(self) -> Values:
        """What is written; assign to replace it."""
        return Values(self.inner.detach(), self.outer.detach())

    @values.setter
    def values(self, new: Values) -> None:
        for name, tensor in (("inner", new.inner), ("outer", new.outer)):
            old: Tensor = getattr(self, name)
            setattr(self, name, nn.Parameter(tensor.detach().to(old).contiguous(), old.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        """Return what this memory adds to x.

        Args:
            x: Residual stream (batch, tokens, hidden_size), any floating dtype.

        Returns:
            Δ of the same shape, in float32; a single 0 where no row is open.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            n = F.layer_norm(x, x.shape[-1:])
            size = x.square().mean(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).sqrt()  # padding may be 0
            if (trained := self.trained) is not None:
                inner, outer = trained.values.inner[trained.owners], trained.values.outer[trained.owners]
                hidden = self.activation(n @ inner.transpose(1, 2))
                hidden = hidden if trained.mask is None else hidden * trained.mask[..., None]
                return hidden @ outer.transpose(1, 2) * size
            reader, adapter_name = cast("tuple[KeyReader, str]", vars(self)["gate"])
            opened = reader.opened(adapter_name)
            if opened is None or len(opened.things) == 0:
                return x.new_zeros(())
            things = opened.things.to(x.device)
            inner, outer = self.inner[things].float(), self.outer[things].float()
            mask = opened.mask.to(x).repeat_interleave(inner.shape[1], -1)  # (batch, tokens, things · units)
            hidden = self.activation(F.linear(n, inner.flatten(0, 1))) * mask
            return F.linear(hidden, outer.transpose(0, 1).flatten(1, 2)) * size
