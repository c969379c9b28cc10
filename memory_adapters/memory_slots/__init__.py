"""Memory slots: a context compressed into vectors that the frozen model reads before a prompt."""

from memory_adapters.memory_slots.config import MemorySlotsConfig
from memory_adapters.memory_slots.memory import SlotMemory
from memory_adapters.memory_slots.slots import MemorySlots
from memory_adapters.registry import register_memory

__all__ = ["MemorySlots", "MemorySlotsConfig", "SlotMemory"]

register_memory(MemorySlotsConfig, SlotMemory)
