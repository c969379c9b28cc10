"""Knowledge for frozen language models: memories that are written, switched off, removed, saved and shared."""

from memory_adapters.inject import inject_memory, load_memory, memories
from memory_adapters.knowledge import Document, Fact, QuestionAnswer
from memory_adapters.memit import Covariance, CovarianceFitter, MemitConfig, MemitMemory
from memory_adapters.memory import Memory, WriteReport
from memory_adapters.memory_slots import MemorySlots, MemorySlotsConfig, SlotMemory
from memory_adapters.residual_mlp import MemoryAdapterConfig, ResidualMemory, speaking_by_row

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
    "MemorySlots",
    "MemorySlotsConfig",
    "QuestionAnswer",
    "ResidualMemory",
    "SlotMemory",
    "WriteReport",
    "inject_memory",
    "load_memory",
    "memories",
    "speaking_by_row",
]
