"""Find the decoder blocks, embeddings and head of a causal LM from the model's structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from memory_adapters.validation import shown

__all__ = [
    "Decoder",
    "base_linears",
    "base_model",
    "check_not_sharded",
    "context_length",
    "execution_device",
    "find_decoder",
    "resolve_layers",
    "unwrapped",
]

NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Decoder:
    """Store the parts of a causal LM that the memory methods touch.

    Attributes:
        blocks: The decoder blocks, lowest first.
        path: Dotted name of `blocks` in the model, such as `"model.layers"`.
        hidden_size: Width d of the residual stream.
        embeddings: The input embedding module.
        head: The output projection (`hidden_size` to vocabulary).
        model_type: The architecture's name, for PEFT's own tables.
    """

    blocks: nn.ModuleList
    path: str
    hidden_size: int
    embeddings: nn.Module
    head: nn.Module
    model_type: str | None = None

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embeddings: token ids must be below it."""
        return int(cast(torch.Tensor, self.embeddings.weight).shape[0])

    @property
    def embedding_size(self) -> int:
        """Width of the input embeddings: `hidden_size` in most models, less in some OPT."""
        return int(cast(torch.Tensor, self.embeddings.weight).shape[1])

    @property
    def stack_path(self) -> str:
        """Dotted name of the module that runs the blocks, such as `"model"`."""
        return self.path.rpartition(".")[0]

    def block_name(self, layer: int) -> str:
        """Return the dotted name of block `layer`, such as `"model.layers.7"`."""
        return f"{self.path}.{layer}"


def find_decoder(model: PreTrainedModel, layers_path: str | None = None) -> Decoder:
    """Locate the decoder blocks, embeddings and head of `model`.

    The blocks are the outermost `ModuleList` of one module class that has as many entries as the model's
    configuration has hidden layers. Nothing depends on the model's name.

    Args:
        model: A Hugging Face causal LM.
        layers_path: Dotted name of the `ModuleList` of blocks, for a model whose structure is not recognised.

    Raises:
        ValueError: If the blocks, embeddings, head or width cannot be found, or `layers_path` names no `ModuleList`.
    """
    model_config = getattr(model, "config", None)
    text_config = getattr(model_config, "get_text_config", lambda: model_config)()
    name = type(model).__name__
    if layers_path is not None:
        try:
            blocks = model.get_submodule(layers_path)
        except AttributeError:
            raise ValueError(f"`layers_path={layers_path!r}` names no module of {name}.") from None
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            raise ValueError(f"`layers_path={layers_path!r}` must name a non-empty ModuleList of {name}.")
        path = layers_path
    else:
        depth = getattr(text_config, "num_hidden_layers", None)
        found = [(n, m) for n, m in model.named_modules() if _is_block_list(m, depth)]
        found = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
        if len(found) != 1:
            lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
            raise ValueError(
                f"Cannot tell which modules of {name} are its decoder blocks ({len(found)} candidates for "
                f"num_hidden_layers={depth}). Set `layers_path` in the config to their ModuleList, one of {lists}."
            )
        (path, blocks) = found[0]
        assert isinstance(blocks, nn.ModuleList)
    hidden_size = getattr(text_config, "hidden_size", None)
    if not isinstance(hidden_size, int):
        raise ValueError(f"{name} has no integer `config.hidden_size`; a memory needs the width of its stream.")
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings is None or head is None:
        raise ValueError(f"{name} has no input or output embeddings; load it with a causal LM head.")
    return Decoder(blocks, path, hidden_size, embeddings, head, getattr(text_config, "model_type", None))


def _is_block_list(module: nn.Module, depth: int | None) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == depth and len({type(m) for m in module}) == 1


def resolve_layers(layers: Sequence[int | float], num_layers: int) -> list[int]:
    """Turn the `layers` field of a config into sorted block indices.

    Args:
        layers: Block indices, negatives counted from the top; or one float in [0, 1], the block at that depth; or two,
            a range of depth `(low, high)`: every block `i` with `low <= i / num_layers < high` (at least one).
        num_layers: Number of blocks of the model.

    Raises:
        ValueError: If an index is out of range or named twice.
    """
    if all(isinstance(layer, float) for layer in layers):
        low, high = layers[0], layers[-1]
        chosen = [i for i in range(num_layers) if low <= i / num_layers < high]
        return chosen or [min(int(low * num_layers), num_layers - 1)]
    indices = []
    for layer in layers:
        index = int(layer)
        if not -num_layers <= index < num_layers:
            raise ValueError(
                f"`layers` has {index}, but the model has {num_layers} blocks: "
                f"use {-num_layers} to {num_layers - 1}, or a range of depth such as (0.7, 0.8)."
            )
        indices.append(index % num_layers)
    if len(set(indices)) < len(indices):
        raise ValueError(f"`layers={shown(list(layers))}` names a block twice (of {num_layers}).")
    return sorted(indices)


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the Hugging Face model itself, also of a PeftModel."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def context_length(model: PreTrainedModel) -> int:
    """Return how many tokens the model's positions allow; a very large number where its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT


def execution_device(module: nn.Module) -> torch.device:
    """Return the device that `module` computes on, also where accelerate keeps its weights elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    devices = [p.device for p in module.parameters() if p.device.type != "meta"]
    if devices:
        return devices[0]
    for child in module.children():
        if getattr(child, "_hf_hook", None) is not None:
            return execution_device(child)
    return torch.device("cpu")


def check_not_sharded(model: nn.Module) -> None:
    """Raise a `ValueError` if the model's weights are divided among processes (FSDP2, DeepSpeed ZeRO-3)."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"`model` is sharded already (`{name}`): a memory's parameters would not be sharded and synchronised "
                "with it. Inject, load and write first, on the whole model, and call `fully_shard`, "
                "`accelerator.prepare` or `deepspeed.initialize` afterwards."
            )


def unwrapped(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def base_linears(block: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a block's leaf modules and the adapter layers around them, by dotted name, in order."""
    for name, child in block.named_children():
        inner = f"{path}.{name}" if path else name
        wrapped = isinstance(child, BaseTunerLayer) and child.get_base_layer() is not child
        if wrapped or next(child.children(), None) is None:
            yield inner, child
        else:
            yield from base_linears(child, inner)
