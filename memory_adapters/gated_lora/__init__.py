"""The gated LoRA."""

from memory_adapters.gated_lora.config import GatedLoraConfig
from memory_adapters.gated_lora.memory import GatedLoraMemory
from memory_adapters.registry import register_method

__all__ = ["GatedLoraConfig", "GatedLoraMemory"]

register_method("gated_lora", GatedLoraConfig, GatedLoraMemory)
