"""The memory of one block: a gated residual MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from memory_adapters.residual_mlp.config import MemoryAdapterConfig

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """Compute what one memory adds to the residual stream at one block.

    All parameters sit directly on this module, so whatever moves or offloads modules moves them together.

    Attributes:
        up, up_bias: W_up (memory_dim, hidden_size) and its bias.
        down, down_bias: W_down (hidden_size, memory_dim) and its bias.
        norm_weight, norm_bias: The final LayerNorm (hidden_size,).
        gate: The scalar gate (1,).
        gate_weight, gate_bias: The sigmoid token gate (1, hidden_size), (1,); only with `token_gate="sigmoid"`.
        keys, key_bias: What the key token gate and the router look for (num_keys, hidden_size), (num_keys,), scaled so
            that `max(keys · n(x) + key_bias)` is 0 at the threshold and 1 where the gate is fully open. Buffers: they
            are found in closed form, not trained.
    """

    keys: Tensor
    key_bias: Tensor

    def __init__(self, hidden_size: int, config: MemoryAdapterConfig) -> None:
        super().__init__()
        self.token_gate_kind = config.token_gate
        self.has_keys = config.has_keys
        self.stream_scale = config.stream_scale
        self.norm_cap = config.norm_cap
        self.dropout = config.dropout
        self.activation = ACT2FN[config.activation]
        self.gate_init = float(config.gate_init or 0.0)
        self.up = nn.Parameter(torch.empty(config.memory_dim, hidden_size))
        self.up_bias = nn.Parameter(torch.empty(config.memory_dim))
        self.down = nn.Parameter(torch.empty(hidden_size, config.memory_dim))
        self.down_bias = nn.Parameter(torch.empty(hidden_size))
        self.norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.norm_bias = nn.Parameter(torch.empty(hidden_size))
        self.gate = nn.Parameter(torch.empty(1))
        if config.token_gate == "sigmoid":
            self.gate_weight = nn.Parameter(torch.empty(1, hidden_size))
            self.gate_bias = nn.Parameter(torch.empty(1))
        if self.has_keys:
            self.register_buffer("keys", torch.zeros(config.num_keys, hidden_size))
            self.register_buffer("key_bias", torch.zeros(config.num_keys))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialise as `nn.Linear` and `nn.LayerNorm` do: identity with `gate_init=0`, with a live gradient."""
        with torch.no_grad():
            for weight, bias in ((self.up, self.up_bias), (self.down, self.down_bias)):
                bound = weight.shape[1] ** -0.5
                for tensor in (weight, bias):
                    start = torch.rand(tensor.shape, generator=generator) * (2 * bound) - bound
                    tensor.copy_(start)
            self.norm_weight.fill_(1.0)
            self.norm_bias.zero_()
            self.gate.fill_(self.gate_init)
            if self.token_gate_kind == "sigmoid":
                self.gate_weight.zero_()
                self.gate_bias.zero_()

    def token_gate(self, x: Tensor) -> Tensor | None:
        """Return how far the memory opens at each token.

        Args:
            x: Residual stream (..., hidden_size), float32.

        Returns:
            (..., 1) in [0, 1], or None if it is open everywhere. It looks at one position alone, so prefill and cached
            decoding agree.
        """
        if self.token_gate_kind == "none":
            return None
        if self.token_gate_kind == "sigmoid":
            n = F.layer_norm(x, x.shape[-1:])
            return torch.sigmoid(F.linear(n, self.gate_weight.float(), self.gate_bias.float()))
        return self.nearness(x)[..., None].clamp(0, 1)

    def nearness(self, x: Tensor) -> Tensor:
        """Return max_k (s_k(x) − θ_k) / ramp (...), in float32, at each token of x (..., hidden_size)."""
        if self.keys.shape[0] == 0:
            return x.new_zeros(x.shape[:-1])
        return F.linear(F.layer_norm(x, x.shape[-1:]), self.keys.float(), self.key_bias.float()).amax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Return what this memory adds to x.

        Args:
            x: Residual stream (batch, tokens, hidden_size), any floating dtype.

        Returns:
            Δ of the same shape, in float32. Computed in float32 also under autocast.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            size = x.shape[-1:]
            read = F.layer_norm(x, size) if self.stream_scale else x
            hidden = self.activation(F.linear(read, self.up.float(), self.up_bias.float()))
            hidden = F.dropout(hidden, self.dropout, self.training)
            value = F.linear(hidden, self.down.float(), self.down_bias.float())
            delta = self.gate.float() * F.layer_norm(value, size, self.norm_weight.float(), self.norm_bias.float())
            if self.stream_scale:
                delta = delta * x.square().mean(-1, keepdim=True).sqrt()
            if self.norm_cap is not None:
                limit = self.norm_cap * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
                norm = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
                delta = delta * (limit / norm.clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=1)
            opened = self.token_gate(x)
            return delta if opened is None else delta * opened

    def add_keys(self, keys: Tensor, key_bias: Tensor) -> None:
        """Append keys (n, hidden_size) and biases (n,) to those stored."""
        self.keys = torch.cat([self.keys, keys.to(self.keys)])
        self.key_bias = torch.cat([self.key_bias, key_bias.to(self.key_bias)])
