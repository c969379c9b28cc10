"""Fingerprints that tell one base model and tokenizer from another."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import Decoder, find_decoder

__all__ = [
    "Fingerprint",
    "base_fingerprint",
    "check_fingerprint",
    "tokenizer_fingerprint",
    "tokenizer_habits",
    "warn_if_unmarked",
]

Fingerprint: TypeAlias = Mapping[str, "str | int | None"]
"""What tells a base model and its tokenizer from others, by name; see `base_fingerprint`."""

HABITS = {
    "special_tokens": "prompts now get different special tokens, so the memory may not activate.",
    "added_tokens": "text with these tokens is now split differently, so the memory may not activate there.",
    "chat_template": "chats are now formatted differently, so the memory may not activate in them.",
}
_PROBE = "The quick brown fox: 1234.56 + (x_1 != y2)\n\tnaïve café, Grüße, Ελλάδα, Привет, 你好，안녕하세요, नमस्ते! 🙂"


def base_fingerprint(
    model: PreTrainedModel, layers_path: str | None = None, *, decoder: Decoder | None = None
) -> dict[str, str | int | None]:
    """Return what identifies a base model, whatever precision it is loaded in.

    Only signs of weights are hashed: they survive a change between float32, bfloat16 and float16. Quantised weights
    are left out, so a quantised copy of a base has the embeddings' hash alone in common with it.

    Args:
        model: A Hugging Face causal LM.
        layers_path: As in `find_decoder`.
        decoder: The model's parts, if they are known already.

    Returns:
        `model_type`, `hidden_size`, `num_layers`, `embeddings` (SHA-256 of the signs of every 16th of the first 1,024
        embedding rows), `head` (the same of the output projection; None if it is quantised), `blocks` (SHA-256 of the
        signs of the first row of every floating matrix of the first and last block; None if there is none) and
        `all_blocks` (the same of all; None if some are quantised or offloaded).
    """
    decoder = decoder or find_decoder(model, layers_path)
    with align_module_device(decoder.embeddings):
        rows = _plain(decoder.embeddings).weight[:1024:16]
        embeddings = _mark([rows])
    with align_module_device(_plain(decoder.head)):
        matrix = _matrix(_plain(decoder.head))
        head = None if matrix is None else _mark([matrix[:1024:16]])
    first_rows: list[torch.Tensor] = []
    for block in (decoder.blocks[0], decoder.blocks[-1]):
        for module in _base_modules(block):
            with align_module_device(module):
                first_rows += _first_row(module) or []
    every = [_first_row(module) for block in decoder.blocks for module in _base_modules(block)]
    partial = not first_rows or any(rows is None for rows in every)
    return {
        "model_type": model.config.model_type,
        "hidden_size": decoder.hidden_size,
        "num_layers": decoder.num_layers,
        "embeddings": embeddings,
        "head": head,
        "blocks": _mark(first_rows),
        "all_blocks": None if partial else _mark([row for rows in every for row in rows or []]),
    }


def _first_row(module: nn.Module) -> list[torch.Tensor] | None:
    """Return the first row of a module's matrix, or nothing if it has none; None if it is quantised, or elsewhere."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return []
    matrix = _matrix(module)
    return None if matrix is None else [matrix[0].detach().cpu()]


def _matrix(module: nn.Module) -> torch.Tensor | None:
    """Return a module's weight; None unless it is a matrix of floats, and here."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or type(weight.data) is not torch.Tensor:  # but torchao's
        return None
    return weight if weight.ndim == 2 and weight.dtype in _FLOATS and not weight.is_meta else None


def _mark(rows: list[torch.Tensor]) -> str | None:
    """Return the hash of rows; None if there are none, or NaN or infinity in them: damaged weights identify nothing."""
    return _sign_hash(rows) if rows and all(row.isfinite().all() for row in rows) else None


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _plain(module: nn.Module) -> Any:
    """Return the base model's own module, whatever adapters have around it or in its place."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _plain(module.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _base_modules(block: nn.Module) -> Iterator[nn.Module]:
    """Yield a block's modules that are the base model's own, in order, without the adapters around or inside them."""
    for child in block.children():
        if not isinstance(child, BaseTunerLayer):
            yield child
            yield from _base_modules(child)
        elif (base := child.get_base_layer()) is not child:
            yield base


def _sign_hash(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(torch.signbit(tensor.detach()).to("cpu", torch.uint8).contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the ids of a fixed multilingual text: what the tokenizer does, not what it is called."""
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def tokenizer_habits(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """Return, for a fingerprint, what tokenizers that split plain text alike may still do differently.

    Returns:
        `special_tokens` (the ids of "a" with all that is put around it), `added_tokens` (SHA-256 of the tokens added
        to the vocabulary) and `chat_template` (SHA-256; None if there is none).
    """
    added = sorted(getattr(tokenizer, "get_added_vocab", dict)().items())
    template = getattr(tokenizer, "chat_template", None)
    return {
        "special_tokens": str(list(tokenizer("a")["input_ids"])),
        "added_tokens": hashlib.sha256(json.dumps(added).encode()).hexdigest(),
        "chat_template": hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None,
    }


def check_fingerprint(saved: Fingerprint, found: Fingerprint) -> None:
    """Compare the fingerprint in a file with that of the model at hand; fields that either side lacks pass.

    Warns where only a habit of the tokenizer differs: see `tokenizer_habits`.

    Raises:
        ValueError: Naming the first field that differs, and both values.
    """
    for key, value in found.items():
        other = saved.get(key)
        if value is not None and other is not None and value != other:
            if key in HABITS:
                warnings.warn(
                    f"The tokenizer's `{key}` is not what it was when this memory was written ({other}, now {value}): "
                    f"{HABITS[key]} Load the tokenizer that it was written with.",
                    stacklevel=3,
                )
                continue
            what = "tokenizer" if key == "tokenizer" else "base model"
            raise ValueError(
                f"This memory belongs to another {what}: its `{key}` is {other}, the one given has {value}. "
                f"Load the {what} it was written with."
            )


def warn_if_unmarked(saved: Fingerprint | None, what: str) -> None:
    """Warn if a file holds no fingerprint of the base that it belongs to."""
    if not (saved or {}).get("embeddings"):
        warnings.warn(
            f"{what} does not say which base model it belongs to (`base_fingerprint`): whether it fits this one cannot "
            "be checked. Save it again with a version of memory-adapters that says it.",
            stacklevel=3,
        )
