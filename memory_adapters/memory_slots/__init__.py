"""Memory slots: a context compressed into vectors that the frozen model reads before a prompt."""

from memory_adapters.memory_slots.config import MemorySlotsConfig
from memory_adapters.memory_slots.memory import SlotMemory
from memory_adapters.memory_slots.slots import MemorySlots
from memory_adapters.memory_slots.tuner import SlotTuner
from memory_adapters.peft_layers.refusing_tuner import register_with_peft
from memory_adapters.registry import Variant, register_method

__all__ = ["MemorySlots", "MemorySlotsConfig", "SlotMemory"]

register_with_peft(MemorySlotsConfig, MemorySlotsConfig.kind, SlotTuner)
register_method(
    "slots",
    MemorySlotsConfig,
    SlotMemory,
    variants={
        "encoder": Variant({"refine_steps": 0}, start="saved"),
        "slots": Variant({"refine_steps": 100}),
        "prompt": Variant({"num_slots": 1, "span_length": 1, "lora_rank": 1}, {"compress": False}, start="fresh"),
    },
)
