"""The settings that all memory methods share."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import peft
import torch
from peft import PeftConfig, TaskType

if TYPE_CHECKING:
    from memory_adapters.base_model.decoder import Decoder
    from memory_adapters.report import WriteReport

from memory_adapters.validation import (
    check_choice,
    check_fingerprint_fields,
    check_flag,
    check_name,
    check_texts,
    shown,
)

__all__ = ["MemoryConfig", "MemoryPeftType"]

ANSWER_FIELDS = {"prompt", "before", "after"}
MOST_WRITES = 100
FILE_FORMAT = 1


class MemoryPeftType(str):
    """Name the PEFT type of a memory method: PEFT's own `PeftType` is a closed enumeration, this is open."""

    @property
    def value(self) -> str:
        """The name as a plain string, as of an enumeration's member."""
        return str(self)


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
