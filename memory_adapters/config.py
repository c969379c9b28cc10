"""What the configs of all memory methods share, and the registry that maps a config to its method."""

from __future__ import annotations

import enum
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import peft
import torch
from peft import PeftConfig, TaskType

if TYPE_CHECKING:
    from memory_adapters.decoder import Decoder
    from memory_adapters.memory import Memory
    from memory_adapters.write_report import WriteReport

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
MOST_WRITES = 100
FILE_FORMAT = 1
LARGEST_INTEGER = 1 << 53
LARGEST_NUMBER = sys.float_info.max
LONGEST_NAME = 4096


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
        file_format: Version of the saved files.
        writes: What each of the last 100 `write`s did, as label and value; shown on the model card.
        answers: Prompts of what was written last (`prompt`), and the model's answers without the memory (`before`) and
            with it (`after`); shown on the model card.
    """

    method_name: ClassVar[str]
    kind: ClassVar[MemoryPeftType]
    card_note: ClassVar[str] = ""  # what the model card says of other ways to use the files
    layers_path: str | None = None
    base_fingerprint: dict[str, Any] | None = field(default=None, repr=False)
    file_format: int = field(default=FILE_FORMAT, repr=False)
    writes: list[dict[str, str]] = field(default_factory=list, repr=False)
    answers: list[dict[str, str]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.file_format != FILE_FORMAT or type(self.file_format) is not int:
            raise ValueError(
                f"`file_format` is {shown(self.file_format)}, and this version of memory-adapters reads {FILE_FORMAT}: "
                "update memory-adapters."
            )
        if self.task_type is not None:
            check_choice("task_type", self.task_type, [kind.value for kind in TaskType])
        super().__post_init__()
        for name in ("base_model_name_or_path", "revision", "peft_version", "layers_path"):
            check_name(name, getattr(self, name))
        check_flag("inference_mode", self.inference_mode)
        if self.base_fingerprint is not None:
            check_fingerprint_fields("base_fingerprint", self.base_fingerprint)
        check_texts("writes", self.writes)
        check_texts("answers", self.answers, ANSWER_FIELDS)

    def record(self, report: WriteReport) -> None:
        """Enter what a `write` did; all but the last 100 are dropped, or a memory in service would grow for ever."""
        self.writes = [*self.writes, dict(report.rows())][-MOST_WRITES:]
        self.answers = report.answers

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
                f"Unknown config field(s) {shown(unknown)} for {cls.__name__}: the file is damaged, or was written by "
                f"a newer version of memory-adapters or PEFT (its is {shown(kwargs.get('peft_version'))}, here is "
                f"{peft.__version__}): update both."
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
    largest = LARGEST_INTEGER if integer else LARGEST_NUMBER
    valid = number and not isinstance(value, bool) and max(low, -largest) <= value <= min(high, largest)
    if not valid or (open_low and value == low):
        bounds = ["an integer" if integer else "a finite number"]
        bounds += [] if low == float("-inf") else [f"above {low}" if open_low else f"at least {low}"]
        bounds += [f"and at most {min(high, largest)}"] if high < largest or (number and value > largest) else []
        raise ValueError(f"`{name}` must be {' '.join(bounds)}, got {shown(value)}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise a `ValueError` naming config field `name` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {sorted(choices)}, got {shown(value)}.")


def check_flag(name: str, value: Any) -> None:
    """Raise a `ValueError` naming config field `name` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shown(value)}.")


def check_name(name: str, value: Any) -> None:
    """Raise a `ValueError` naming config field `name` unless `value` is None or a name: text on one line."""
    if value is not None and not (isinstance(value, str) and value.isprintable() and len(value) <= LONGEST_NAME):
        raise ValueError(f"`{name}` must be a name of printable characters, got {shown(value)}.")


def check_texts(name: str, value: Any, keys: Collection[str] | None = None) -> None:
    """Raise a `ValueError` naming config field `name` unless `value` lists objects of text (with just these keys)."""
    for entry in value if isinstance(value, list) else [value]:
        known = isinstance(entry, dict) and (keys is None or set(entry) == set(keys))
        if not known or not all(isinstance(text, str) for text in (*entry, *entry.values())):
            what = "objects of text" if keys is None else str(sorted(keys))
            raise ValueError(f"`{name}` must be a list of {what}, got {shown(entry)}.")


def check_fingerprint_fields(name: str, value: Any) -> None:
    """Raise a `ValueError` naming `name` unless `value` could be a fingerprint: names, and text or numbers of each."""
    entries = value.items() if isinstance(value, dict) and len(value) <= 64 else [(None, None)]
    if not all(isinstance(key, str) and len(key) <= 100 and _is_label(entry) for key, entry in entries):
        raise ValueError(f"`{name}` must have a text or a whole number for each of its names, got {shown(value)}.")


def _is_label(value: Any) -> bool:
    return value is None or type(value) is int or (isinstance(value, str) and len(value) <= 1000)


def shown(value: Any) -> str:
    """`value` for an error message, cut where it is long."""
    return cut(repr(value))


def cut(text: str) -> str:
    """Text for an error message, cut where it is long."""
    return text if len(text) <= 200 else f"{text[:200]}…"


def checked_layers(layers: Any) -> list[int | float]:
    """`layers` as a list of ints, or of one or two floats (lists, because configs travel as JSON)."""
    listed = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    indices = all(type(layer) is int for layer in listed)
    depths = all(isinstance(x, float) and 0 <= x <= 1 for x in listed) and len(listed) <= 2 and listed == sorted(listed)
    if not listed or not (indices or depths):
        raise ValueError(
            "`layers` must be block indices such as [7, 8], a depth such as 0.25, or a range such as (0.7, 0.8), "
            f"got {shown(layers)}."
        )
    return listed
