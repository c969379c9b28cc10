"""Memory slots: texts, whole or compressed into vectors, that the frozen model reads where a prompt asks for them."""

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
        "encoder": Variant({"refine_steps": 0}, {"compress": True}, start="saved"),
        "slots": Variant(start="fresh"),
        "retrieval": Variant({"read": "bm25"}, start="fresh"),
        "message": Variant({"read": "all", "space": "kv"}, start="fresh"),
        "refined": Variant({"read": "all", "refine_steps": 100}, {"compress": True}),
        "prompt": Variant(
            {"read": "all", "num_slots": 1, "span_length": 1, "lora_rank": 1}, {"compress": False}, start="fresh"
        ),
    },
)
