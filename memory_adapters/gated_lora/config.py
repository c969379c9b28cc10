"""Settings of the gated LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import nn

from memory_adapters.base_model.decoder import Decoder, resolve_layers
from memory_adapters.base_model.matrices import block_matrices, lora_shapes, takes_lora
from memory_adapters.config import STATE, TRAINING, MemoryConfig, MemoryPeftType
from memory_adapters.peft_layers.lora_config import check_target_modules, lora_config
from memory_adapters.validation import check_flag, check_number, checked_layers, shown

__all__ = ["GatedLoraConfig"]


@dataclass
class GatedLoraConfig(MemoryConfig):
    """Configure a LoRA that acts from where a prompt meets a key of what was written, and nowhere else.

    Keys are compared with the output x of one block, as those of the residual memory. At the tokens of a row from the
    first that is near a key on, and at what is generated behind them, the LoRA on the blocks above takes part; before
    that, and in rows that meet no key, the model is the base, bit for bit.

    Attributes:
        key_layer: Block that the keys are compared with: an index, or a depth in [0, 1]. Resolved to an index when the
            memory is injected. The LoRA is on the blocks above it.
        lora_rank: Rank of the LoRA.
        lora_alpha: Its scale.
        target_modules: Names of the matrices it sits on, such as `["q_proj", "down_proj"]`; by default all of the
            blocks above `key_layer`. Resolved to full names at injection.
        key_threshold: Similarity to a key (1 at the key, about 0 on unrelated text) above which a row opens.
        key_owners: For each key, the index in `names` of the subject that it is of; -1 for none. Filled in by `write`.
        names: For each subject, the token ids of its spellings. Filled in by `write`.
        learning_rate: Peak learning rate of AdamW, which falls to 0 linearly.
        num_train_epochs: Most passes over the rows.
        target_loss: Training ends after an epoch whose mean loss is below this; 0 to make all passes.
        batch_size: Rows a step.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: Gradient clipping.
        warmup_steps: Steps of linear warm-up.
        num_prefixes: Varied prefixes behind which a fact is trained, beside its bare prompt.
        phrasings: Whether facts are also trained as answers to questions that are made of their prompts, in the chat
            template, where there is one.
        max_length: Longest row in tokens; longer documents are split into windows. None for the model's context.
        seed: Of the initialisation, the data order and the sampled text.
    """

    method_name: ClassVar[str] = "Gated LoRA"
    kind: ClassVar[MemoryPeftType] = MemoryPeftType("GATED_LORA")
    card_note: ClassVar[str] = (
        "It is an ordinary LoRA adapter too: `peft.PeftModel.from_pretrained(model, ...)` uses it without "
        "memory-adapters, but then without its gate: it acts in every text.\n\n"
    )

    key_layer: int | float = 0.18
    lora_rank: int = 8
    lora_alpha: int = 16
    target_modules: list[str] | None = None
    key_threshold: float = 0.6
    key_owners: list[int] = field(default_factory=list, repr=False, metadata=STATE)
    names: list[list[list[int]]] = field(default_factory=list, repr=False, metadata=STATE)
    learning_rate: float = field(default=1e-3, metadata=TRAINING)
    num_train_epochs: float = field(default=6, metadata=TRAINING)
    target_loss: float = field(default=0.0, metadata=TRAINING)
    batch_size: int = field(default=16, metadata=TRAINING)
    weight_decay: float = field(default=0.0, metadata=TRAINING)
    max_grad_norm: float = field(default=1.0, metadata=TRAINING)
    warmup_steps: int = field(default=5, metadata=TRAINING)
    num_prefixes: int = field(default=2, metadata=TRAINING)
    phrasings: bool = field(default=True, metadata=TRAINING)
    max_length: int | None = field(default=None, metadata=TRAINING)
    seed: int = field(default=0, metadata=TRAINING)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind
        self.task_type = "CAUSAL_LM"
        if len(checked_layers(self.key_layer)) != 1:
            raise ValueError(f"`key_layer` must be one block or depth, got {shown(self.key_layer)}.")
        check_target_modules(self.target_modules)
        check_number("lora_rank", self.lora_rank, low=1, integer=True)
        check_number("lora_alpha", self.lora_alpha, low=0, open_low=True)
        check_number("key_threshold", self.key_threshold, low=0, high=1, open_low=True)
        _check_names(self.key_owners, self.names)
        check_number("learning_rate", self.learning_rate, low=0, open_low=True)
        check_number("num_train_epochs", self.num_train_epochs, low=0, open_low=True)
        check_number("target_loss", self.target_loss, low=0)
        check_number("batch_size", self.batch_size, low=1, integer=True)
        check_number("weight_decay", self.weight_decay, low=0)
        check_number("max_grad_norm", self.max_grad_norm, low=0, open_low=True)
        check_number("warmup_steps", self.warmup_steps, low=0, integer=True)
        check_number("num_prefixes", self.num_prefixes, low=0, integer=True)
        check_flag("phrasings", self.phrasings)
        if self.max_length is not None:
            check_number("max_length", self.max_length, low=2, integer=True)
        check_number("seed", self.seed, low=0, integer=True)

    def card_settings(self) -> dict[str, Any]:
        """Do as `MemoryConfig`; the LoRA's matrices, once resolved, are given by the ends of their names."""
        settings = super().card_settings()
        if self.target_modules is not None:
            settings["target_modules"] = sorted({name.rpartition(".")[2] for name in self.target_modules})
        return settings

    @property
    def block(self) -> int:
        """The index of the block that keys are compared with, once resolved."""
        assert isinstance(self.key_layer, int)
        return self.key_layer

    def resolve(self, decoder: Decoder) -> None:
        """Fill in the block of the keys, and the full names of the LoRA's matrices."""
        (self.key_layer,) = resolve_layers(checked_layers(self.key_layer), decoder.num_layers)[:1]
        if self.key_layer == decoder.num_layers - 1:
            raise ValueError(f"`key_layer={self.key_layer}` is the last block: choose one with blocks above it.")
        self.target_modules = sorted(self.modules(decoder))

    def modules(self, decoder: Decoder) -> dict[str, nn.Module]:
        """Return the matrices that the LoRA sits on, by full name.

        Raises:
            ValueError: If `target_modules` names none above the block of the keys.
        """
        every = block_matrices(decoder, range(self.block + 1, decoder.num_layers))
        asked = self.target_modules
        if asked is None:
            return {name: module for name, module in every.items() if takes_lora(decoder, name, module)}
        known = {name: {name, *_ends(name)} for name in every}
        missing = set(asked).difference(*known.values()) if len(asked) <= len(every) else set(asked)
        if missing:
            raise ValueError(
                f"`target_modules` names {shown(sorted(missing))}, which the blocks above {self.block} do not have."
            )
        return {name: every[name] for name, ends in known.items() if ends & set(asked)}

    def adapter_config(self, decoder: Decoder) -> PeftConfig:
        """Return the config of the LoRA."""
        return lora_config(
            self.modules(decoder),
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            base_model=self.base_model_name_or_path,
        )

    def lora_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return names and shapes of the LoRA's tensors."""
        shapes: dict[str, torch.Size] = {}
        for name, module in self.modules(decoder).items():
            shapes |= lora_shapes(name, module, self.lora_rank)
        return shapes

    def key_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return names and shapes of the keys' tensors."""
        number = len(self.key_owners)
        return {"keys": torch.Size((number, decoder.hidden_size)), "key_bias": torch.Size((number,))}

    def tensor_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return names and shapes of the LoRA's tensors, and of the keys."""
        return {**self.lora_shapes(decoder), **self.key_shapes(decoder)}


def _check_names(owners: Any, names: Any) -> None:
    """Raise a `ValueError` unless keys have owners among names, which are lists of lists of token ids."""
    nested = isinstance(names, list) and all(isinstance(x, list) and all(isinstance(y, list) for y in x) for x in names)
    if not nested or not all(type(i) is int and i >= 0 for own in names for ids in own for i in ids):
        raise ValueError(f"`names` must be a list of lists of lists of token ids, got {shown(names)}.")
    if not isinstance(owners, list) or not all(type(i) is int and -1 <= i < len(names) for i in owners):
        raise ValueError(f"`key_owners` must be a list of indices of `names`, or -1, got {shown(owners)}.")


def _ends(name: str) -> list[str]:
    """Return the ends of a dotted name, each without one more part in front."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]
