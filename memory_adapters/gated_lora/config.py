"""Settings of the gated LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import nn

from memory_adapters.base_model.decoder import Decoder, resolve_layers
from memory_adapters.base_model.matrices import block_matrices, lora_shapes, mlp_matrices
from memory_adapters.config import STATE, TRAINING, MemoryConfig, MemoryPeftType
from memory_adapters.peft_layers.lora_config import check_target_modules, lora_config
from memory_adapters.validation import check_flag, check_number, checked_layers, shown

__all__ = ["GatedLoraConfig"]


@dataclass
class GatedLoraConfig(MemoryConfig):
    """Configure a small LoRA for each thing that is written, which acts from where a prompt meets a key of it.

    A thing is what facts have as their subject, or what questions name. Keys are compared with the output x of one
    block, as those of the residual memory. From the first token of a row that is near a key of a thing on, and at what
    is generated behind it, the thing's LoRA on blocks above takes part; before that, and in rows that meet no key, the
    model is the base, bit for bit.

    Attributes:
        key_layer: Block that the keys are compared with: an index, or a depth in [0, 1]. Resolved to an index when the
            memory is injected.
        layers: Blocks with LoRAs, all above `key_layer`: indices (negatives count from the top), or a range of depth.
            Resolved to indices when the memory is injected.
        lora_rank: Rank of a thing's LoRA.
        lora_alpha: Its scale is `lora_alpha / lora_rank`.
        target_modules: Names of the matrices it sits on, such as `["q_proj", "down_proj"]`; by default those of the
            MLPs. Resolved to full names at injection.
        key_threshold: Similarity to a key (1 at the key, about 0 on unrelated text) above which a row opens.
        things: What is written about, by name. Filled in by `write`.
        names: For each of `things`, the token ids of its spellings. Filled in by `write`.
        windows: For each of `things`, over how many tokens more than these a text may spread them. Filled in by
            `write`.
        item_things: For each of `items`, the index in `things` of what it is about. Filled in by `write`.
        key_owners: For each key, the index in `things` of what it is of. Filled in by `write`.
        learning_rate: Peak learning rate of AdamW, which falls to 0 linearly.
        num_train_epochs: Most passes over a thing's rows.
        steps_per_epoch: Steps in a pass, each of them on as many rows of each of a thing's items, and at least two.
        target_loss: A thing's training ends after a pass whose mean loss is below this; 0 to make all passes.
        max_grad_norm: Gradient clipping, for each thing by itself.
        warmup_steps: Steps of linear warm-up.
        num_prefixes: Varied prefixes behind which a fact is trained, beside its bare prompt.
        phrasings: Whether facts are also trained as answers to questions, their own or made of their prompts, in the
            chat template, where there is one.
        max_length: Longest row in tokens; longer documents are split into windows. None for the model's context.
        seed: Of the initialisation, the data order and the sampled text.
    """

    method_name: ClassVar[str] = "Gated LoRA"
    kind: ClassVar[MemoryPeftType] = MemoryPeftType("GATED_LORA")
    card_note: ClassVar[str] = (
        "It is an ordinary LoRA adapter too: `peft.PeftModel.from_pretrained(model, ...)` uses it without "
        "memory-adapters, but then without its gate: all of its things act at once, in every text.\n\n"
    )

    key_layer: int | float = 0.18
    layers: Sequence[int | float] | int | float = (0.4, 1.0)
    lora_rank: int = 2
    lora_alpha: int = 4
    target_modules: list[str] | None = None
    key_threshold: float = 0.6
    things: list[str] = field(default_factory=list, repr=False, metadata=STATE)
    names: list[list[list[int]]] = field(default_factory=list, repr=False, metadata=STATE)
    windows: list[int] = field(default_factory=list, repr=False, metadata=STATE)
    item_things: list[int] = field(default_factory=list, repr=False, metadata=STATE)
    key_owners: list[int] = field(default_factory=list, repr=False, metadata=STATE)
    learning_rate: float = field(default=6e-3, metadata=TRAINING)
    num_train_epochs: float = field(default=4, metadata=TRAINING)
    steps_per_epoch: int = field(default=7, metadata=TRAINING)
    target_loss: float = field(default=0.01, metadata=TRAINING)
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
        self.layers = checked_layers(self.layers)
        check_target_modules(self.target_modules)
        check_number("lora_rank", self.lora_rank, low=1, integer=True)
        check_number("lora_alpha", self.lora_alpha, low=0, open_low=True)
        check_number("key_threshold", self.key_threshold, low=0, high=1, open_low=True)
        _check_things(self.things, self.names, self.windows, self.item_things, self.key_owners)
        check_number("learning_rate", self.learning_rate, low=0, open_low=True)
        check_number("num_train_epochs", self.num_train_epochs, low=0, open_low=True)
        check_number("steps_per_epoch", self.steps_per_epoch, low=1, integer=True)
        check_number("target_loss", self.target_loss, low=0)
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

    @property
    def blocks(self) -> list[int]:
        """The indices of the blocks with LoRAs, once resolved."""
        assert isinstance(self.layers, list)
        return [int(layer) for layer in self.layers]

    @property
    def scale(self) -> float:
        """The factor on what a thing's LoRA adds."""
        return self.lora_alpha / self.lora_rank

    def resolve(self, decoder: Decoder) -> None:
        """Fill in the block of the keys, the blocks with LoRAs, and the full names of their matrices."""
        (self.key_layer,) = resolve_layers(checked_layers(self.key_layer), decoder.num_layers)[:1]
        if self.key_layer == decoder.num_layers - 1:
            raise ValueError(f"`key_layer={self.key_layer}` is the last block: choose one with blocks above it.")
        assert isinstance(self.layers, list)
        self.layers = resolve_layers(self.layers, decoder.num_layers)
        if self.layers[0] <= self.key_layer:
            raise ValueError(
                f"`layers` has block {self.layers[0]}, which must be above `key_layer`, which is block "
                f"{self.key_layer} of {decoder.num_layers}."
            )
        self.target_modules = sorted(self.modules(decoder))

    def modules(self, decoder: Decoder) -> dict[str, nn.Module]:
        """Return the matrices that LoRAs sit on, by full name.

        Raises:
            ValueError: If `target_modules` names none in these blocks.
        """
        asked = self.target_modules
        if asked is None:
            return mlp_matrices(decoder, self.blocks)
        every = block_matrices(decoder, self.blocks)
        known = {name: {name, *_ends(name)} for name in every}
        missing = set(asked).difference(*known.values()) if len(asked) <= len(every) else set(asked)
        if missing:
            raise ValueError(
                f"`target_modules` names {shown(sorted(missing))}, which the blocks {self.blocks} do not have."
            )
        return {name: every[name] for name, ends in known.items() if ends & set(asked)}

    def adapter_config(self, decoder: Decoder) -> PeftConfig:
        """Return the config of the LoRA, of one thing's rank as long as nothing is written."""
        return lora_config(
            self.modules(decoder),
            rank=self.lora_rank,
            alpha=self.lora_rank,
            base_model=self.base_model_name_or_path,
        )

    def lora_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return names and shapes of the LoRA's tensors, which hold those of all things, one behind the other."""
        shapes: dict[str, torch.Size] = {}
        for name, module in self.modules(decoder).items():
            shapes |= lora_shapes(name, module, self.lora_rank * max(len(self.things), 1))
        return shapes

    def key_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return names and shapes of the keys' tensors."""
        number = len(self.key_owners)
        return {"keys": torch.Size((number, decoder.hidden_size)), "key_bias": torch.Size((number,))}

    def tensor_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return names and shapes of the LoRA's tensors, and of the keys."""
        return {**self.lora_shapes(decoder), **self.key_shapes(decoder)}


def _check_things(things: Any, names: Any, windows: Any, item_things: Any, key_owners: Any) -> None:
    """Raise a `ValueError` unless things have names, which are lists of lists of token ids, and indices are theirs."""
    if not isinstance(things, list) or not all(isinstance(one, str) for one in things):
        raise ValueError(f"`things` must be a list of names, got {shown(things)}.")
    nested = isinstance(names, list) and all(isinstance(x, list) and all(isinstance(y, list) for y in x) for x in names)
    if (
        not nested
        or len(names) != len(things)
        or not all(type(i) is int and i >= 0 for own in names for ids in own for i in ids)
    ):
        raise ValueError(f"`names` must have a list of lists of token ids for each of `things`, got {shown(names)}.")
    counts = isinstance(windows, list) and all(type(i) is int and i >= 0 for i in windows)
    if not counts or len(windows) != len(things):
        raise ValueError(f"`windows` must have a number for each of `things`, got {shown(windows)}.")
    for field_name, indices in (("item_things", item_things), ("key_owners", key_owners)):
        if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < len(things) for i in indices):
            raise ValueError(f"`{field_name}` must be a list of indices of `things`, got {shown(indices)}.")


def _ends(name: str) -> list[str]:
    """Return the ends of a dotted name, each without one more part in front."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]
