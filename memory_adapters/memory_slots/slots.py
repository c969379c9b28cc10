"""Slots as a value: what a text was compressed into, to keep, join, send and read again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from peft import PromptTuningConfig, TaskType
from torch import Tensor
from transformers import PreTrainedModel

from memory_adapters.base_model.fingerprint import Fingerprint, check_fingerprint, warn_if_unmarked
from memory_adapters.files.atomic import atomic_directory, atomic_file
from memory_adapters.files.hub import OneFile
from memory_adapters.files.model_card import HERE, file_card
from memory_adapters.files.strict_json import parse_json
from memory_adapters.files.tensors import read_metadata, read_tensors, write_tensors
from memory_adapters.validation import check_fingerprint_fields, check_number, shown

__all__ = ["MemorySlots"]

NAME = "slots"
FORMAT = "memory-adapters slots 1"
SNIPPET = f"""from memory_adapters import MemorySlots

slots = MemorySlots.load("{HERE}")
memory.use(slots)  # a `SlotMemory`'s; the model reads them before every prompt"""


@dataclass(frozen=True)
class MemorySlots(OneFile):
    """Store vectors that a frozen model reads before a prompt, as input embeddings.

    Attributes:
        vectors: (slots, embedding_size), float32, in the space of the model's input embeddings.
        spans: Slots of each span, in the order of the text.
        num_tokens: Tokens of the text.
        base_fingerprint: Which model reads them.
        encoder_fingerprint: Which encoder made them (SHA-256 of its tensors); None if they were joined from several.
        text_sha256: SHA-256 of the text (UTF-8).
        refine_steps: Gradient steps that they were refined for.
    """

    file: ClassVar[str] = "slots.safetensors"

    vectors: Tensor
    spans: tuple[int, ...]
    num_tokens: int
    base_fingerprint: Fingerprint = field(repr=False)
    encoder_fingerprint: str | None = field(repr=False)
    text_sha256: str = field(repr=False)
    refine_steps: int = 0

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or not len(self.vectors) or sum(self.spans) != len(self.vectors):
            raise ValueError(
                f"`vectors` must be (slots, embedding_size) with as many slots as the spans {self.spans} have in all, "
                f"got shape {tuple(self.vectors.shape)}."
            )

    @property
    def num_slots(self) -> int:
        return len(self.vectors)

    @property
    def num_spans(self) -> int:
        return len(self.spans)

    @property
    def compression_rate(self) -> float:
        """Tokens of the text ÷ slots: what was achieved, whatever was asked for."""
        return self.num_tokens / self.num_slots

    def __add__(self, other: MemorySlots) -> MemorySlots:
        """Return these slots, then those of `other`.

        Raises:
            ValueError: If they belong to different models.
        """
        if not isinstance(other, MemorySlots):
            return NotImplemented
        if self.base_fingerprint != other.base_fingerprint:
            raise ValueError("Slots of different base models cannot be joined: compress both texts with one model.")
        same = self.encoder_fingerprint == other.encoder_fingerprint
        return MemorySlots(
            torch.cat([self.vectors, other.vectors.to(self.vectors.device)]),
            (*self.spans, *other.spans),
            self.num_tokens + other.num_tokens,
            self.base_fingerprint,
            self.encoder_fingerprint if same else None,
            f"{self.text_sha256}+{other.text_sha256}",
            min(self.refine_steps, other.refine_steps),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[MemorySlots]) -> MemorySlots:
        """Return all of `parts`, one after the other."""
        if not parts:
            raise ValueError("`parts` is empty: give slots to join.")
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def split(self) -> list[MemorySlots]:
        """Return the slots of each span, all else as it is."""
        return [replace(self, vectors=part, spans=(len(part),)) for part in self.vectors.split(list(self.spans))]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        about = {
            "format": FORMAT,
            "spans": self.spans,
            "num_tokens": self.num_tokens,
            "base_fingerprint": dict(self.base_fingerprint),
            "encoder_fingerprint": self.encoder_fingerprint,
            "text_sha256": self.text_sha256,
            "refine_steps": self.refine_steps,
        }
        with atomic_file(path) as staging:
            write_tensors(staging, {NAME: self.vectors}, {NAME: json.dumps(about, sort_keys=True)})

    @classmethod
    def _read(cls, file: Path) -> MemorySlots:
        shapes, metadata = read_metadata(file)
        try:
            about = parse_json(metadata[NAME])
            if (made := about.pop("format")) != FORMAT or set(shapes) != {NAME}:
                raise ValueError(f"unknown format {shown(made)}: update memory-adapters")
            spans = tuple(about.pop("spans"))
            fields = {name: about.pop(name) for name in ("num_tokens", "refine_steps")}
            hashes = {name: about.pop(name) for name in ("base_fingerprint", "encoder_fingerprint", "text_sha256")}
            check_number("num_tokens", fields["num_tokens"], low=1, integer=True)
            check_number("refine_steps", fields["refine_steps"], low=0, integer=True)
            for span in spans:
                check_number("spans", span, low=1, integer=True)
            check_fingerprint_fields("base_fingerprint", hashes["base_fingerprint"])
            if not isinstance(hashes["text_sha256"], str) or not isinstance(hashes["encoder_fingerprint"], str | None):
                raise ValueError("hashes that are no text")
            if about:
                raise ValueError(f"unknown fields {shown(sorted(about))}: update memory-adapters")
            if len(shapes[NAME]) != 2 or not all(shapes[NAME]) or sum(spans) != shapes[NAME][0]:
                raise ValueError(f"vectors of shape {shapes[NAME]} for {shown(sum(spans))} slots")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"`{file}` is not a file of slots ({error}).") from error
        vectors = read_tensors(file, {NAME: torch.Size(shapes[NAME])})[NAME]
        return cls(vectors.float(), spans, **fields, **hashes)

    def check_fits(self, base_fingerprint: Fingerprint | None, embedding_size: int) -> None:
        """Raise a `ValueError` if the slots belong to another model than that of this fingerprint and width."""
        warn_if_unmarked(self.base_fingerprint, "A file of slots")
        check_fingerprint(self.base_fingerprint, base_fingerprint or {})
        if self.vectors.shape[1] != embedding_size:
            raise ValueError(
                f"`slots` are {self.vectors.shape[1]} wide, the model's embeddings {embedding_size}: compress the text "
                "with this model."
            )

    def _card(self) -> str:
        return file_card(
            title=f"{self.num_slots} memory slots",
            tag="memory-slots",
            text=f"A text of {self.num_tokens:,} tokens, compressed into vectors that a frozen language model reads.",
            snippet=SNIPPET,
            about={
                "slots": self.num_slots,
                "spans": self.num_spans,
                "tokens of the text": f"{self.num_tokens:,}",
                "compression rate": f"{self.compression_rate:.2f}",
                "steps of refinement": self.refine_steps,
            },
            base_fingerprint=self.base_fingerprint,
        )

    def to_prompt_tuning(self, save_directory: str | os.PathLike[str], model: PreTrainedModel) -> None:
        """Save as a plain PEFT prompt-tuning adapter, which generates the same where memory-adapters is not installed.

        Args:
            save_directory: A folder; its other files stay.
            model: The base model, for its sizes and name.
        """
        text = model.config.get_text_config()
        config = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=self.num_slots,
            token_dim=self.vectors.shape[1],
            num_transformer_submodules=1,
            num_attention_heads=text.num_attention_heads,
            num_layers=text.num_hidden_layers,
            base_model_name_or_path=getattr(model, "name_or_path", None) or None,
            inference_mode=True,
        )
        with atomic_directory(save_directory) as staging:
            write_tensors(staging / "adapter_model.safetensors", {"prompt_embeddings": self.vectors})
            config.save_pretrained(str(staging))

    def __repr__(self) -> str:
        return (
            f"MemorySlots({self.num_slots} slots for {self.num_tokens} tokens, rate {self.compression_rate:.2f}, "
            f"{self.num_spans} span{'s' * (self.num_spans > 1)}, refined for {self.refine_steps} steps)"
        )
