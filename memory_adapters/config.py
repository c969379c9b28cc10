"""What the configs of all memory methods share, and the registry that maps a config to its method."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftConfig

if TYPE_CHECKING:
    from memory_adapters.decoder import Decoder
    from memory_adapters.memory import Memory

__all__ = [
    "MemoryConfig",
    "MemoryPeftType",
    "check_choice",
    "check_number",
    "checked_layers",
    "memory_class",
    "register_memory",
]

ANSWER_FIELDS = {"prompt", "before", "after"}


class MemoryPeftType(str, enum.Enum):
    """PEFT types of the memory methods, beside PEFT's own closed `PeftType`."""

    MEMORY_ADAPTER = "MEMORY_ADAPTER"
    MEMIT = "MEMIT"
    MEMORY_SLOTS = "MEMORY_SLOTS"


@dataclass
class MemoryConfig(PeftConfig):
    """Fields that every memory method has.

    Attributes:
        layers_path: Dotted name of the model's list of decoder blocks; only needed where it is not recognised.
        base_fingerprint: Which base model and tokenizer the memory belongs to. Filled in at injection, checked at load.
        writes: What each `write` did, as label and value; shown on the model card.
        answers: Prompts of what was written last (`prompt`), and the model's answers without the memory (`before`) and
            with it (`after`); shown on the model card.
    """

    method_name: ClassVar[str]
    kind: ClassVar[MemoryPeftType]
    card_note: ClassVar[str] = ""  # what the model card says of other ways to use the files
    layers_path: str | None = None
    base_fingerprint: dict[str, Any] | None = field(default=None, repr=False)
    writes: list[dict[str, str]] = field(default_factory=list, repr=False)
    answers: list[dict[str, str]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for answer in self.answers if isinstance(self.answers, list) else [self.answers]:
            known = isinstance(answer, dict) and set(answer) == ANSWER_FIELDS
            if not known or not all(isinstance(text, str) for text in answer.values()):
                raise ValueError(f"`answers` must be a list of {sorted(ANSWER_FIELDS)}, got {answer!r}.")

    def card_settings(self) -> dict[str, Any]:
        """Fields of this method that differ from their defaults, for the model card."""
        shared = {f.name for f in fields(MemoryConfig)}
        own = [f for f in fields(self) if f.name not in shared and f.repr]
        default = type(self)()
        return {f.name: getattr(self, f.name) for f in own if getattr(self, f.name) != getattr(default, f.name)}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build the config, refusing fields it does not have (PEFT alone would drop them with a warning)."""
        known = {f.name for f in fields(cls)}
        if cls is not MemoryConfig and (unknown := sorted(set(kwargs) - known)):
            raise ValueError(
                f"Unknown config field(s) {unknown} for {cls.__name__}: "
                "the file is damaged or was written by a newer version of memory-adapters."
            )
        return cls(**kwargs) if cls is not MemoryConfig else super().from_peft_type(**kwargs)

    def adapter_config(self, decoder: Decoder) -> PeftConfig:
        """What PEFT is given to inject: this config itself, if its PEFT type is the method's own."""
        return self

    def check_model(self, decoder: Decoder) -> None:
        """Raise a `ValueError` if the config asks for something that this model does not have."""
        raise NotImplementedError

    def tensor_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Names (as on the model, without the adapter's) and shapes of the tensors that a saved memory must have."""
        raise NotImplementedError


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


def check_number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = float("inf"),
    integer: bool = False,
    open_low: bool = False,
) -> None:
    """Raise a `ValueError` naming config field `name` unless `value` is a number in [low, high] (or (low, high])."""
    number = isinstance(value, int) or (isinstance(value, float) and not integer)
    valid = number and not isinstance(value, bool) and low <= value <= high
    if not valid or (open_low and value == low):
        kind = "an integer" if integer else "a number"
        bounds = f"above {low}" if open_low else f"at least {low}"
        bounds += "" if high == float("inf") else f" and at most {high}"
        raise ValueError(f"`{name}` must be {kind} {bounds}, got {value!r}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise a `ValueError` naming config field `name` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {sorted(choices)}, got {value!r}.")


def checked_layers(layers: Any) -> list[int | float]:
    """`layers` as a list of ints, or of one or two floats (lists, because configs travel as JSON)."""
    listed = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    indices = all(type(layer) is int for layer in listed)
    depths = all(isinstance(x, float) and 0 <= x <= 1 for x in listed) and len(listed) <= 2 and listed == sorted(listed)
    if not listed or not (indices or depths):
        raise ValueError(
            "`layers` must be block indices such as [7, 8], a depth such as 0.25, or a range such as (0.7, 0.8), "
            f"got {layers!r}."
        )
    return listed
