"""Which memory methods there are: their configs and their classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import PeftConfig

if TYPE_CHECKING:
    from memory_adapters.memory import Memory

from memory_adapters.config import MemoryConfig

__all__ = ["memory_class", "register_memory"]


_MEMORY_CLASSES: dict[type[MemoryConfig], type[Memory]] = {}


def register_memory(config_class: type[MemoryConfig], memory: type[Memory]) -> None:
    """Let `inject_memory` and `load_memory` answer to `config_class` with `memory`."""
    _MEMORY_CLASSES[config_class] = memory


def memory_class(config: PeftConfig) -> type[Memory] | None:
    """The memory class registered for `config`, or None if the config belongs to no memory method."""
    return _MEMORY_CLASSES.get(type(config))


def config_class(peft_type: object) -> type[MemoryConfig] | None:
    """The registered config class of a `peft_type` read from a file, or None."""
    return next((config for config in _MEMORY_CLASSES if config.kind.value == peft_type), None)


def saved_files() -> list[str]:
    """Names of all files that a saved memory of any method may have."""
    return sorted({file for memory in _MEMORY_CLASSES.values() for file in (*memory.files, *memory.optional_files)})


def memory_config_names() -> list[str]:
    """Names of the registered config classes, for error messages."""
    return sorted(config.__name__ for config in _MEMORY_CLASSES)
