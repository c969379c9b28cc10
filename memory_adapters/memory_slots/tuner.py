"""Memory slots as PEFT and transformers meet them: they save them, and are told how to load them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor

from memory_adapters.base_model.decoder import base_model
from memory_adapters.files.names import PEFT_KEY_PREFIX
from memory_adapters.inject import memories
from memory_adapters.peft_layers.refusing_tuner import RefusingTuner

__all__ = ["SlotTuner"]


class SlotTuner(RefusingTuner):
    """Give PEFT the encoder's tensors to save; the config saves the slots."""

    refusal: ClassVar[str] = (
        "PEFT and transformers cannot put memory slots on a model by themselves: load saved ones into the base model "
        "with `memory_adapters.load_memory(model, folder, tokenizer=tokenizer)`, or make new ones with "
        "`memory_adapters.inject_memory(model, MemorySlotsConfig(), tokenizer=tokenizer)`."
    )

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: PeftConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        base = base_model(model)
        prefix = "" if base is model else PEFT_KEY_PREFIX
        memory: Any = memories(base)[adapter_name]
        return {prefix + name: tensor for name, tensor in memory.saved_tensors().items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    @torch.no_grad()
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Copy the tensors into the encoder, as when a checkpoint is resumed, and leave nothing to load."""
        memory: Any = memories(base_model(model))[adapter_name]
        encoder = memory.encoder
        own = encoder.tensors()
        for name in encoder.config.saved_shapes(encoder.decoder, [k.removeprefix(PEFT_KEY_PREFIX) for k in state_dict]):
            own[name].copy_(state_dict[PEFT_KEY_PREFIX + name])
        return {}
