"""Knowledge for frozen language models: memories that are written, switched off, removed, saved and shared."""

from typing import TYPE_CHECKING

from memory_adapters.cli import is_starting, load_library

if TYPE_CHECKING or not is_starting():
    from memory_adapters.composition.activation import use_adapters, use_adapters_by_row
    from memory_adapters.composition.collection import SaveAdaptersCallback, load_adapters, save_adapters
    from memory_adapters.composition.merging import merge_lora
    from memory_adapters.explanation import Explanation
    from memory_adapters.files.item_files import read_items
    from memory_adapters.gated_lora import GatedLoraConfig, GatedLoraMemory
    from memory_adapters.inject import inject_memory, load_memory, memories
    from memory_adapters.items import Document, Fact, QuestionAnswer
    from memory_adapters.memit import Covariance, CovarianceFitter, MemitConfig, MemitMemory
    from memory_adapters.memory import Memory
    from memory_adapters.memory_slots import MemorySlots, MemorySlotsConfig, SlotMemory
    from memory_adapters.report import WriteReport
    from memory_adapters.residual_mlp import MemoryAdapterConfig, MemoryRouter, ResidualMemory, route_memories
else:  # the command line, which answers `--help` before it imports all this

    def __getattr__(name: str) -> object:
        if name not in __all__ or not is_starting():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        load_library()
        return globals()[name]


__version__ = "0.2.0"

__all__ = [
    "Covariance",
    "CovarianceFitter",
    "Document",
    "Explanation",
    "Fact",
    "GatedLoraConfig",
    "GatedLoraMemory",
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
    "read_items",
    "route_memories",
    "save_adapters",
    "use_adapters",
    "use_adapters_by_row",
]
