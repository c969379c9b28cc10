"""The config that all memory methods share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

import peft
import torch
from peft import PeftConfig, TaskType

from memory_adapters.base_model.decoder import Decoder
from memory_adapters.items import Item, item_from_dict, item_to_dict
from memory_adapters.report import WriteReport
from memory_adapters.validation import (
    check_choice,
    check_fingerprint_fields,
    check_flag,
    check_name,
    shown,
)

__all__ = ["CHECKED", "STATE", "TRAINING", "MemoryConfig", "MemoryPeftType"]

CHECKED = "_resolved_for"  # set on a config while `inject_memory`, which has resolved and checked it, calls PEFT

MOST_WRITES = 100
FILE_FORMAT = 2

# What a config field is, as its `metadata`; a field without is a setting: it says what the memory is and does.
STATE = {"role": "state"}  # filled in by the library: what was written, which base model it belongs to
TRAINING = {"role": "training"}  # how a write finds the memory's numbers: the recipe


class MemoryPeftType(str):
    """Name the PEFT type of a memory method: PEFT's own `PeftType` is a closed enumeration, this is open."""

    @property
    def value(self) -> str:
        """The name as a plain string, as of an enumeration's member."""
        return str(self)


@dataclass
class MemoryConfig(PeftConfig):
    """Configure a memory; the base of all methods' configs.

    Attributes:
        layers_path: Dotted name of the model's list of decoder blocks; only needed where it is not recognised.
        base_fingerprint: Which base model and tokenizer the memory belongs to. Filled in at injection, checked at load.
        file_format: Version of the saved files.
        items: What is written, in order: the fields of each item. Filled in by `write` and `forget`.
        writes: Reports of the last 100 writes, as `WriteReport.to_dict` gives them; shown on the model card.
    """

    method_name: ClassVar[str]
    kind: ClassVar[MemoryPeftType]
    card_note: ClassVar[str] = ""  # what the model card says of other ways to use the files
    layers_path: str | None = None
    base_fingerprint: dict[str, str | int | None] | None = field(default=None, repr=False, metadata=STATE)
    file_format: int = field(default=FILE_FORMAT, repr=False, metadata=STATE)
    items: list[dict[str, Any]] = field(default_factory=list, repr=False, metadata=STATE)
    writes: list[dict[str, Any]] = field(default_factory=list, repr=False, metadata=STATE)

    def __post_init__(self) -> None:
        if self.file_format != FILE_FORMAT or type(self.file_format) is not int:
            newer = type(self.file_format) is int and self.file_format > FILE_FORMAT
            remedy = "update memory-adapters" if newer else "load it with the version that saved it, or write it again"
            raise ValueError(
                f"`file_format` is {shown(self.file_format)}, and this version of memory-adapters reads {FILE_FORMAT}: "
                f"{remedy}."
            )
        if self.task_type is not None:
            check_choice("task_type", self.task_type, [kind.value for kind in TaskType])
        super().__post_init__()
        for name in ("base_model_name_or_path", "revision", "peft_version", "layers_path"):
            check_name(name, getattr(self, name))
        check_flag("inference_mode", self.inference_mode)
        if self.base_fingerprint is not None:
            check_fingerprint_fields("base_fingerprint", self.base_fingerprint)
        self.written_items()
        self.reports()

    def written_items(self) -> list[Item]:
        """Return `items` as items. Raises a `ValueError` if one is none."""
        if not isinstance(self.items, list):
            raise ValueError(f"`items` must be a list of items, got {shown(self.items)}.")
        try:
            return [item_from_dict(item) for item in self.items]
        except ValueError as error:
            raise ValueError(f"`items` must be a list of items, but one {error}") from None

    def reports(self) -> list[WriteReport]:
        """Return `writes` as reports. Raises a `ValueError` if one is none."""
        if not isinstance(self.writes, list):
            raise ValueError(f"`writes` must be a list of reports, got {shown(self.writes)}.")
        try:
            return [WriteReport.from_dict(write) for write in self.writes]
        except ValueError as error:
            raise ValueError(f"`writes` must be a list of reports: {error}.") from None

    def record(self, report: WriteReport) -> None:
        """Add a report to `writes`, and drop all but the last 100: a memory in service would grow for ever."""
        self.writes = [*self.writes, {**report.to_dict(), "results": []}][-MOST_WRITES:]

    def set_items(self, items: Sequence[Item]) -> None:
        """Store what is written."""
        self.items = [item_to_dict(item) for item in items]

    @classmethod
    def own_fields(cls, *roles: str) -> list[Field[Any]]:
        """Return the fields that memory methods add to PEFT's, of these roles: `"setting"`, `"training"`, `"state"`."""
        peft_fields = {own.name for own in fields(PeftConfig)}
        return [own for own in fields(cls) if own.name not in peft_fields and _role(own) in roles and own.repr]

    @classmethod
    def settable_fields(cls) -> list[str]:
        """Return the names of the fields that a user may set: settings and the training recipe."""
        return [own.name for own in cls.own_fields("setting", "training")]

    def card_settings(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, for the model card."""
        shared = {own.name for own in fields(MemoryConfig)}
        default = type(self)()
        names = [name for name in self.settable_fields() if name not in shared]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build the config, refusing fields it does not have (PEFT alone would drop them with a warning)."""
        known = {own.name for own in fields(cls)}
        if cls is not MemoryConfig and (unknown := sorted(set(kwargs) - known)):
            raise ValueError(
                f"Unknown config field(s) {shown(unknown)} for {cls.__name__}: the file is damaged, or was written by "
                f"a newer version of memory-adapters or PEFT (its is {shown(kwargs.get('peft_version'))}, here is "
                f"{peft.__version__}): update both."
            )
        return cls(**kwargs) if cls is not MemoryConfig else super().from_peft_type(**kwargs)

    def resolve(self, decoder: Decoder) -> None:
        """Fill in what depends on the model, such as block indices.

        Raises:
            ValueError: If the config asks for something that this model does not have.
        """
        raise NotImplementedError

    def adapter_config(self, decoder: Decoder) -> PeftConfig | None:
        """Return what PEFT injects: this config itself, another such as a `LoraConfig`, or None for nothing."""
        return self

    def tensor_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return name (as on the model, without the adapter's) and shape of each tensor that is saved."""
        raise NotImplementedError


def _role(own: Field[Any]) -> str:
    return own.metadata.get("role", "setting")
