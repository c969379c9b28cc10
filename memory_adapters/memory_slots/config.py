"""Settings of memory slots."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from memory_adapters.base_model.decoder import Decoder
from memory_adapters.base_model.matrices import block_matrices, lora_shapes, takes_lora
from memory_adapters.config import STATE, TRAINING, MemoryConfig, MemoryPeftType
from memory_adapters.memory_slots.entries import SlotEntry
from memory_adapters.memory_slots.entries_file import ENTRIES_FILE, save_entries
from memory_adapters.memory_slots.slots import MemorySlots
from memory_adapters.peft_layers.lora_config import check_target_modules, lora_config
from memory_adapters.validation import check_choice, check_flag, check_number, shown

__all__ = ["MemorySlotsConfig"]

READS = ("names", "bm25", "all")
SPACES = ("kv", "embeddings")
POOLINGS = ("tokens", "mean")


@dataclass
class MemorySlotsConfig(MemoryConfig):
    """Configure memory slots: texts that the model reads whole, as keys and values, or as embeddings (ICAE).

    The encoder is the model itself with a LoRA that is active only while it compresses.

    Attributes:
        read: Which entries a prompt reads: `"names"`, those whose name stands in it, or else those that a rare name in
            it, such as a person's, is written in; `"bm25"`, those that share most words with what is asked, named or
            not; `"all"`, everything, compressed as one text. A prompt that reads nothing is the base model's, bit for
            bit.
        top_k: How many are read of the parts of a document that is named (those that share most words with what is
            asked, by BM25), or of all entries with `read="bm25"`.
        part_tokens: Most tokens of an entry: longer documents are cut into parts, at paragraphs and sentences.
        space: What `write(compress=True)` compresses into: `"kv"`, keys and values of the text at every block, chosen
            by the attention that they receive, without training; or `"embeddings"`, vectors that an encoder makes.
            None for `"embeddings"` where the encoder was trained or `read="all"`, and `"kv"` elsewhere.
        num_slots: Slots of a full span, k.
        span_length: Tokens of a full span; longer text is cut into equal spans, for an encoder. `span_length /
            num_slots` is the compression rate asked for, of keys and values too; what was achieved is
            `SlotEntry.compression_rate`.
        pooling: Where slots are read: `"tokens"`, the last hidden states at memory tokens appended to the span (as in
            the paper), or `"mean"`, the mean of neighbouring tokens' embeddings plus a learned sum of their states: an
            encoder that was never trained then gives pooled embeddings.
        bidirectional: Whether the encoder's tokens also attend to those behind them (as in SAC, ICLR 2026), where
            the model takes an attention mask (1, 1, tokens, tokens). An encoder is used as it was trained.
        lora_rank: Rank of the encoder's LoRA (paper: 128).
        lora_alpha: Its scale (paper: 32).
        target_modules: Names of the matrices it sits on; by default PEFT's for the architecture (q and v in most),
            or all of the blocks where PEFT knows none. Resolved to full names at injection.
        objective: What the encoder's training asks of whatever is not autoencoding: `"cross-entropy"` of the text, or
            `"distillation"`, KL from the model that reads the whole context. The mix of autoencoding, continuation and
            instructions is that of the examples.
        refine_steps: Most gradient steps on the slots of a text in `write`; None for 100 with an encoder that was not
            trained, and none elsewhere.
        refine_learning_rate: Adam's, in units of the RMS of the token embeddings (or of a block's keys and values);
            falls to 0 as a cosine. None for 0.25 with a trained encoder, whose slots are near what is sought, 1
            without, and 0.02 for keys and values.
        refine_target_loss: Refinement ends once every token asked is the model's first choice and the mean loss is
            below this.
        refine_fraction: Weight of autoencoding in refinement, against predicting what is asked of the text; of keys and
            values, against what the model says itself behind the text.
        precision: Of the refinement's forward passes: `"model"` for the model's own, or `"bfloat16"` where that is
            fast: a CPU without its instructions (AVX-512 on x86) takes the model's own.
        encoder_steps: Updates that the encoder was trained for. Filled in by training.
        has_slots: Whether slots are saved beside the encoder. Filled in when saving.
        opening: Token ids that the chat template puts before what a user says: there slots stand in a chat, inside
            the turn; elsewhere before the prompt. Filled in where the tokenizer is known.
        num_entries: How many entries are saved beside the encoder. Filled in when saving.
        seed: Of the initialisation.
    """

    method_name: ClassVar[str] = "Memory slots"
    kind: ClassVar[MemoryPeftType] = MemoryPeftType("MEMORY_SLOTS")
    read: str = "names"
    top_k: int = 1
    part_tokens: int = 128
    space: str | None = None
    num_slots: int = 128
    span_length: int = 512
    pooling: str = "mean"
    bidirectional: bool = False
    lora_rank: int = 32
    lora_alpha: int = 32
    target_modules: list[str] | None = None
    objective: str = field(default="cross-entropy", metadata=TRAINING)
    refine_steps: int | None = field(default=None, metadata=TRAINING)
    refine_learning_rate: float | None = field(default=None, metadata=TRAINING)
    refine_target_loss: float = field(default=0.1, metadata=TRAINING)
    refine_fraction: float = field(default=0.5, metadata=TRAINING)
    precision: str = field(default="model", metadata=TRAINING)
    encoder_steps: int = field(default=0, metadata=STATE)
    has_slots: bool = field(default=False, metadata=STATE)
    opening: list[int] = field(default_factory=list, repr=False, metadata=STATE)
    num_entries: int = field(default=0, metadata=STATE)
    seed: int = field(default=0, metadata=TRAINING)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind
        self.task_type = "CAUSAL_LM"
        # No fields, but saved beside it: slots that are read now, or of all entries; and the entries.
        self.slots: list[MemorySlots] = []
        self.entries: list[SlotEntry] = []
        check_choice("read", self.read, READS)
        check_number("top_k", self.top_k, low=1, integer=True)
        check_number("part_tokens", self.part_tokens, low=1, integer=True)
        if self.space is not None:
            check_choice("space", self.space, SPACES)
        check_number("num_entries", self.num_entries, low=0, integer=True)
        if not isinstance(self.opening, list) or not all(type(i) is int and i >= 0 for i in self.opening):
            raise ValueError(f"`opening` must be a list of token ids, got {shown(self.opening)}.")
        check_number("num_slots", self.num_slots, low=1, integer=True)
        check_number("span_length", self.span_length, low=self.num_slots, integer=True)
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("objective", self.objective, ("cross-entropy", "distillation"))
        check_number("lora_rank", self.lora_rank, low=1, integer=True)
        check_number("lora_alpha", self.lora_alpha, low=0, open_low=True)
        if self.refine_steps is not None:
            check_number("refine_steps", self.refine_steps, low=0, integer=True)
        if self.refine_learning_rate is not None:
            check_number("refine_learning_rate", self.refine_learning_rate, low=0, open_low=True)
        check_number("refine_target_loss", self.refine_target_loss, low=0)
        check_number("refine_fraction", self.refine_fraction, low=0, high=1)
        check_choice("precision", self.precision, ("model", "bfloat16"))
        check_number("encoder_steps", self.encoder_steps, low=0, integer=True)
        check_number("seed", self.seed, low=0, integer=True)
        check_flag("bidirectional", self.bidirectional)
        check_flag("has_slots", self.has_slots)
        check_target_modules(self.target_modules)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config, and slots and entries beside it: transformers and PEFT, which save an adapter so, save both.

        Raises:
            ValueError: If the rows of a batch read slots of their own.
        """
        if len(self.slots) > 1:
            raise ValueError(f"{len(self.slots)} rows read slots of their own: save each with `MemorySlots.save`.")
        saved = copy.copy(self)
        saved.has_slots, saved.num_entries = bool(self.slots), len(self.entries)
        super(MemorySlotsConfig, saved).save_pretrained(save_directory, **kwargs)
        for slots in self.slots:
            slots.save(Path(save_directory) / MemorySlots.file)
        if self.entries:
            save_entries(Path(save_directory) / ENTRIES_FILE, self.entries, self.written_items())

    def card_settings(self) -> dict[str, Any]:
        """Do as `MemoryConfig`; the LoRA's matrices, once resolved, are given by the ends of their names."""
        settings = super().card_settings()
        if self.target_modules is not None:
            settings["target_modules"] = sorted({name.rpartition(".")[2] for name in self.target_modules})
        return settings

    @property
    def resolved_space(self) -> str:
        """`space`, or what its None stands for."""
        if self.space is not None:
            return self.space
        return "embeddings" if self.encoder_steps or self.read == "all" else "kv"

    @property
    def has_entries(self) -> bool:
        """Whether what is written are entries; if not, it is one text, which is compressed and read as a whole."""
        return self.read != "all" or self.resolved_space == "kv"

    @property
    def resolved_refine_steps(self) -> int:
        """`refine_steps`, or what its None stands for."""
        if self.refine_steps is not None:
            return self.refine_steps
        return 0 if self.encoder_steps or self.resolved_space == "kv" else 100

    @property
    def resolved_refine_learning_rate(self) -> float:
        """`refine_learning_rate`, or what its None stands for."""
        if self.refine_learning_rate is not None:
            return self.refine_learning_rate
        if self.resolved_space == "kv":
            return 0.02
        return 0.25 if self.encoder_steps else 1.0

    def slots_for(self, num_tokens: int) -> int:
        """Return the number of slots for a span of so many tokens: in proportion, at least one."""
        return max(1, math.ceil(num_tokens * self.num_slots / self.span_length))

    @property
    def offsets(self) -> int:
        """Most tokens that one slot is pooled from; 1 where it is read at a memory token, 0 with `space="kv"`."""
        if self.space == "kv":
            return 0
        return 1 if self.pooling == "tokens" else math.ceil(self.span_length / self.num_slots)

    @property
    def num_memory_tokens(self) -> int:
        """Embeddings that may be appended to a span; none with `space="kv"`."""
        return 0 if self.space == "kv" else self.num_slots

    def spans_of(self, ids: Sequence[int]) -> list[list[int]]:
        """Cut token ids into equal spans of at most `span_length`."""
        count = math.ceil(len(ids) / self.span_length)
        edges = [round(i * len(ids) / count) for i in range(count + 1)]
        return [list(ids[a:b]) for a, b in pairwise(edges)]

    def resolve(self, decoder: Decoder) -> None:
        """Fill in the full names of the matrices that the encoder's LoRA is on."""
        self.target_modules = sorted(self.modules(decoder))
        self.tensor_shapes(decoder)

    def modules(self, decoder: Decoder) -> dict[str, nn.Module]:
        """Return the matrices that the encoder's LoRA sits on, by full name.

        Raises:
            ValueError: If `target_modules` names none of the blocks.
        """
        every = block_matrices(decoder, range(decoder.num_layers))
        if self.target_modules is not None and len(self.target_modules) > len(every):
            raise ValueError(
                f"`target_modules` has {len(self.target_modules):,} names, the model's blocks {len(every):,} matrices."
            )
        asked = self.target_modules or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(decoder.model_type or "")
        if asked is None:
            return {name: module for name, module in every.items() if takes_lora(decoder, name, module)}
        found = {n: m for n, m in every.items() if any(n == a or n.endswith(f".{a}") for a in asked)}
        missing = [a for a in asked if not any(n == a or n.endswith(f".{a}") for n in found)]
        if missing or not found:
            raise ValueError(f"`target_modules` names {shown(missing or asked)}, which the model's blocks do not have.")
        return found

    def adapter_config(self, decoder: Decoder) -> PeftConfig:
        """Return the config of the encoder's LoRA."""
        return lora_config(
            self.modules(decoder),
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            base_model=self.base_model_name_or_path,
        )

    @property
    def untrained_tensors(self) -> list[str]:
        """Names of what an encoder that was never trained uses: its LoRA and its projection change nothing."""
        parts = ["reconstruct", "memory_tokens"] if self.pooling == "tokens" else ["reconstruct"]
        return [f"memory_slots.{part}" for part in parts]

    def tensor_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return names and shapes of the encoder's tensors: its LoRA, and what it reads slots with."""
        shapes: dict[str, torch.Size] = {}
        for name, module in self.modules(decoder).items():
            shapes |= lora_shapes(name, module, self.lora_rank)
        width = decoder.embedding_size
        own = {
            "memory_tokens": (self.num_memory_tokens, width),
            "reconstruct": (1, width),
            "projection": (self.offsets, width, width),
        }
        return shapes | {f"memory_slots.{part}": torch.Size(shape) for part, shape in own.items()}

    def saved_shapes(self, decoder: Decoder, names: Collection[str]) -> dict[str, torch.Size]:
        """Return names and shapes of what a file with tensors of these names should hold.

        That is all of the encoder, or `untrained_tensors` where it has no others, and nothing was trained.
        """
        shapes = self.tensor_shapes(decoder)
        few = not self.encoder_steps and set(names) == set(self.untrained_tensors)
        return {name: shapes[name] for name in self.untrained_tensors} if few else shapes
