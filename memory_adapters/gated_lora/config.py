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
from memory_adapters.config import TRAINING, MemoryPeftType
from memory_adapters.keys.thing_config import ThingConfig
from memory_adapters.peft_layers.lora_config import check_target_modules, lora_config
from memory_adapters.validation import check_number, checked_layers, shown

__all__ = ["GatedLoraConfig"]


@dataclass
class GatedLoraConfig(ThingConfig):
    """Configure a small LoRA for each thing that is written, which acts from where a prompt meets a key of it.

    A thing is what facts have as their subject, or what questions name. Keys are compared with the output x of one
    block, as those of the residual memory. From the first token of a row that is near a key of a thing on, and at what
    is generated behind it, the thing's LoRA on blocks above takes part; before that, and in rows that meet no key, the
    model is the base, bit for bit. See `ThingConfig` for the settings of keys and rows.

    Attributes:
        layers: Blocks with LoRAs, all above `key_layer`: indices (negatives count from the top), or a range of depth;
            None for all of them. Resolved to indices when the memory is injected.
        lora_rank: Rank of a thing's LoRA.
        lora_alpha: Its scale is `lora_alpha / lora_rank`.
        target_modules: Names of the matrices it sits on, such as `["q_proj", "down_proj"]`; by default those of the
            MLPs. Resolved to full names at injection.
        learning_rate: Peak learning rate of AdamW, which falls to 0 linearly.
        num_train_epochs: Most passes over a thing's rows.
        steps_per_epoch: Steps in a pass, each of them on as many rows of each of a thing's items, and at least two.
        target_loss: A thing's training ends after a pass whose mean loss is below this; 0 to make all passes.
        max_grad_norm: Gradient clipping, for each thing by itself.
        warmup_steps: Steps of linear warm-up.
    """

    method_name: ClassVar[str] = "Gated LoRA"
    kind: ClassVar[MemoryPeftType] = MemoryPeftType("GATED_LORA")
    card_note: ClassVar[str] = (
        "It is an ordinary LoRA adapter too: `peft.PeftModel.from_pretrained(model, ...)` uses it without "
        "memory-adapters, but then without its gate: all of its things act at once, in every text.\n\n"
    )

    layers: Sequence[int | float] | int | float | None = (0.4, 1.0)
    lora_rank: int = 2
    lora_alpha: int = 4
    target_modules: list[str] | None = None
    learning_rate: float = field(default=6e-3, metadata=TRAINING)
    num_train_epochs: float = field(default=6, metadata=TRAINING)
    steps_per_epoch: int = field(default=7, metadata=TRAINING)
    target_loss: float = field(default=0.01, metadata=TRAINING)
    max_grad_norm: float = field(default=1.0, metadata=TRAINING)
    warmup_steps: int = field(default=5, metadata=TRAINING)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind
        self.task_type = "CAUSAL_LM"
        if self.layers is not None:
            self.layers = checked_layers(self.layers)
        check_target_modules(self.target_modules)
        check_number("lora_rank", self.lora_rank, low=1, integer=True)
        check_number("lora_alpha", self.lora_alpha, low=0, open_low=True)
        check_number("learning_rate", self.learning_rate, low=0, open_low=True)
        check_number("num_train_epochs", self.num_train_epochs, low=0, open_low=True)
        check_number("steps_per_epoch", self.steps_per_epoch, low=1, integer=True)
        check_number("target_loss", self.target_loss, low=0)
        check_number("max_grad_norm", self.max_grad_norm, low=0, open_low=True)
        check_number("warmup_steps", self.warmup_steps, low=0, integer=True)

    def card_settings(self) -> dict[str, Any]:
        """Do as `MemoryConfig`; the LoRA's matrices, once resolved, are given by the ends of their names."""
        settings = super().card_settings()
        if self.target_modules is not None:
            settings["target_modules"] = sorted({name.rpartition(".")[2] for name in self.target_modules})
        return settings

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
        self.resolve_key_layer(decoder)
        above = range(self.block + 1, decoder.num_layers)
        self.layers = resolve_layers(checked_layers(self.layers), decoder.num_layers) if self.layers else list(above)
        self.check_above_keys(decoder, self.blocks)
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

    def tensor_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return names and shapes of the LoRA's tensors, and of the keys."""
        return {**self.lora_shapes(decoder), **self.key_shapes(decoder)}


def _ends(name: str) -> list[str]:
    """Return the ends of a dotted name, each without one more part in front."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]
