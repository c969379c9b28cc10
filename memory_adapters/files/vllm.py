"""Write a LoRA as an adapter that vLLM loads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from memory_adapters.files.exports import Write
from memory_adapters.files.names import PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.tensors import write_tensors

__all__ = ["VLLM_RANKS", "vllm_adapter"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` can be."""


def vllm_adapter(factors: Mapping[str, tuple[Tensor, Tensor]], config: LoraConfig, remedy: str) -> Write:
    """Return what writes a plain LoRA adapter, its rank filled up with zeros to one of `VLLM_RANKS`.

    Args:
        factors: A (rank, in) and B (out, rank) by the names of the matrices, whose changes are B A.
        config: The LoRA's, as PEFT has it.
        remedy: What to do where the rank is too large.

    Raises:
        ValueError: If the rank is above the largest of `VLLM_RANKS`.
    """
    rank = max(len(A) for A, _ in factors.values())
    padded = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if padded is None:
        raise ValueError(
            f'`format="vllm"`: vLLM loads adapters up to rank {VLLM_RANKS[-1]}, and this one has rank {rank}: {remedy}'
        )
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"{PEFT_KEY_PREFIX}{name}.lora_A.weight"] = F.pad(A, (0, 0, 0, padded - rank))
        tensors[f"{PEFT_KEY_PREFIX}{name}.lora_B.weight"] = F.pad(B, (0, padded - rank))
    config = copy.copy(config)
    config.r = config.lora_alpha = padded
    config.target_modules = sorted(factors)  # PEFT has a set: the same LoRA gives the same bytes
    config.inference_mode = True

    def write(folder: Path) -> Path:
        write_tensors(folder / WEIGHTS_FILE, tensors)
        config.save_pretrained(str(folder))
        return folder

    return write
