"""The gated residual MLP memory."""

from memory_adapters.keys.router import MemoryRouter, route_memories
from memory_adapters.registry import Variant, register_method
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.memory import ResidualMemory
from memory_adapters.residual_mlp.tuner import register_with_peft

__all__ = ["MemoryAdapterConfig", "MemoryRouter", "ResidualMemory", "route_memories"]

register_with_peft()
register_method(
    "residual",
    MemoryAdapterConfig,
    ResidualMemory,
    variants={"residual": Variant(), "per_key": Variant({"values": "per_key"})},
)
