"""Register memory methods: shared code, the command line and comparisons find a method here, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig

__all__ = [
    "Method",
    "Variant",
    "loaded_file_names",
    "method_of",
    "method_of_type",
    "methods",
    "register_method",
    "saved_file_names",
]


@dataclass(frozen=True)
class Variant:
    """Describe one way to run a method in a comparison.

    Attributes:
        settings: Fields of the method's config that differ from their defaults.
        write_options: Keyword arguments of the memory's `write`.
        start: What the memory is before it is written: `"fresh"`, `"saved"` (the variant needs a saved memory to start
            from, and is left out without one), or `"either"` (a saved memory if one is given).
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    write_options: Mapping[str, Any] = field(default_factory=dict)
    start: Literal["fresh", "saved", "either"] = "either"


@dataclass(frozen=True)
class Method:
    """Describe a memory method.

    Attributes:
        name: Its name on the command line and in comparisons, such as `"memit"`.
        config_class: The `MemoryConfig` that `inject_memory` takes for it.
        memory_class: The `Memory` that `inject_memory` returns.
        variants: Name to variant, for comparisons; by default the method as it is, under its own name.
    """

    name: str
    config_class: type[Any]  # not named here: configs and memories stand above the registry
    memory_class: type[Any]
    variants: Mapping[str, Variant]


_METHODS: dict[str, Method] = {}


def register_method(
    name: str, config_class: type[Any], memory_class: type[Any], *, variants: Mapping[str, Variant] | None = None
) -> None:
    """Let `inject_memory`, `load_memory`, the command line and comparisons use a memory method.

    A second registration under the same name replaces the first.

    Args:
        name: Name of the method, for the command line and comparisons.
        config_class: Subclass of `MemoryConfig`, with a `kind` of its own.
        memory_class: Subclass of `Memory`.
        variants: See `Method`.

    Raises:
        ValueError: If another method has a variant of the same name.
    """
    own = dict(variants or {name: Variant()})
    for other in _METHODS.values():
        if other.name != name and (taken := sorted({name, *own} & {other.name, *other.variants})):
            raise ValueError(f"`variants` has {taken}, which the method {other.name!r} has too: name them otherwise.")
    _METHODS[name] = Method(name, config_class, memory_class, own)


def methods() -> dict[str, Method]:
    """Return the registered methods by name, in the order of their registration."""
    return dict(_METHODS)


def method_of(config: PeftConfig) -> Method | None:
    """Return the method that a config belongs to; None if it is no memory's."""
    return next((method for method in _METHODS.values() if method.config_class is type(config)), None)


def method_of_type(peft_type: object) -> Method | None:
    """Return the method of a `peft_type` read from a file; None if there is none."""
    return next((method for method in _METHODS.values() if method.config_class.kind == peft_type), None)


def loaded_file_names() -> list[str]:
    """Return the names of all files that loading a memory of any method may read."""
    beside = {file for method in _METHODS.values() for file in method.memory_class.files_beside}
    return sorted({*saved_file_names(), *beside})


def saved_file_names() -> list[str]:
    """Return the names of all files that a saved memory of any method may have."""
    classes = [method.memory_class for method in _METHODS.values()]
    return sorted({file for memory in classes for file in (*memory.files, *memory.optional_files)})
