"""Knowledge for frozen language models: memories that are written, switched off, removed, saved and shared."""

from memory_adapters.composition.activation import use_adapters, use_adapters_by_row
from memory_adapters.composition.collection import SaveAdaptersCallback, load_adapters, save_adapters
from memory_adapters.composition.merging import merge_lora
from memory_adapters.inject import inject_memory, load_memory, memories
from memory_adapters.items import Document, Fact, QuestionAnswer
from memory_adapters.memit import Covariance, CovarianceFitter, MemitConfig, MemitMemory
from memory_adapters.memory import Memory
from memory_adapters.memory_slots import MemorySlots, MemorySlotsConfig, SlotMemory
from memory_adapters.report import WriteReport
from memory_adapters.residual_mlp import MemoryAdapterConfig, MemoryRouter, ResidualMemory, route_memories

__version__ = "0.1.0"

__all__ = [
    "Covariance",
    "CovarianceFitter",
    "Document",
    "Fact",
    "MemitConfig",
    "MemitMemory",
    "Memory",
    "MemoryAdapterConfig",
    "MemoryRouter",
    "MemorySlots",
    "MemorySlotsConfig",
    "QuestionAnswer",
    "ResidualMemory",
    "SaveAdaptersCallback",
    "SlotMemory",
    "WriteReport",
    "inject_memory",
    "load_adapters",
    "load_memory",
    "memories",
    "merge_lora",
    "route_memories",
    "save_adapters",
    "use_adapters",
    "use_adapters_by_row",
]
