"""Find the decoder blocks, embeddings and head of a causal LM from the model's structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from memory_adapters.validation import shown

__all__ = [
    "Decoder",
    "attention_window",
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
    """Find the parts of a causal LM that the memory methods touch, anew at each use: heads and embeddings are replaced.

    Attributes:
        model: The causal LM.
        path: Dotted name of the list of decoder blocks in the model, such as `"model.layers"`.
        hidden_size: Width d of the residual stream.
        model_type: The architecture's name, for PEFT's own tables.
    """

    model: PreTrainedModel = field(repr=False)
    path: str
    hidden_size: int
    model_type: str | None = None

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, lowest first."""
        return cast(nn.ModuleList, self.model.get_submodule(self.path))

    @property
    def embeddings(self) -> nn.Module:
        """The input embedding module."""
        return self.model.get_input_embeddings()

    @property
    def head(self) -> nn.Module:
        """The output projection (`hidden_size` to vocabulary)."""
        return cast(nn.Module, self.model.get_output_embeddings())

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

    The blocks are the outermost `ModuleList` that has as many entries as the model's configuration has hidden layers;
    where several have, the one of one class, and in the module that holds the input embeddings. Nothing depends on the
    model's name.

    Args:
        model: A Hugging Face causal LM.
        layers_path: Dotted name of the `ModuleList` of blocks, for a model whose structure is not recognised.

    Raises:
        ValueError: If the blocks, embeddings, head or width cannot be found, `layers_path` names no `ModuleList`, or
            the model is an encoder–decoder.
    """
    name = type(model).__name__
    model_config = getattr(model, "config", None)
    if getattr(model_config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder–decoder; memories are for causal LMs, which have a decoder alone.")
    text_config = getattr(model_config, "get_text_config", lambda **_: model_config)(decoder=True)
    if layers_path is not None:
        try:
            blocks = model.get_submodule(layers_path)
        except AttributeError:
            raise ValueError(f"`layers_path={layers_path!r}` names no module of {name}.") from None
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            raise ValueError(f"`layers_path={layers_path!r}` must name a non-empty ModuleList of {name}.")
    path = layers_path or _find_blocks(model, getattr(text_config, "num_hidden_layers", None))
    hidden_size = getattr(text_config, "hidden_size", None)
    if not isinstance(hidden_size, int):
        raise ValueError(f"{name} has no integer `config.hidden_size`; a memory needs the width of its stream.")
    if _embeddings(model) is None or model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no input or output embeddings; load it with a causal LM head.")
    return Decoder(model, path, hidden_size, getattr(text_config, "model_type", None))


def _find_blocks(model: PreTrainedModel, depth: int | None) -> str:
    """Return the dotted name of the list of decoder blocks, of which there are `depth`."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    found = [n for n, m in lists.items() if len(m) == depth]
    found = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    alike = [n for n in found if len({type(block) for block in lists[n]}) == 1]
    found = alike if alike else found
    if len(found) > 1:  # a multimodal model may have as many blocks for pictures
        embeddings = _embeddings(model)
        around = {n: model.get_submodule(n.rpartition(".")[0]).modules() for n in found}
        found = [n for n, modules in around.items() if any(module is embeddings for module in modules)] or found
    if len(found) != 1:
        raise ValueError(
            f"Cannot tell which modules of {type(model).__name__} are its decoder blocks ({len(found)} candidates for "
            f"num_hidden_layers={depth}). Set `layers_path` in the config to their ModuleList, one of {list(lists)}."
        )
    return found[0]


def _embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        return cast("nn.Module | None", model.get_input_embeddings())
    except (AttributeError, NotImplementedError):
        return None


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
    """Return the Hugging Face model itself, also of a PeftModel.

    Raises:
        TypeError: If it is no model.
    """
    if not isinstance(model, nn.Module):
        load = f"AutoModelForCausalLM.from_pretrained({model!r})" if isinstance(model, str) else "a causal LM"
        raise TypeError(f"`model` is a {type(model).__name__}; give the model itself: {load}.")
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def context_length(model: PreTrainedModel) -> int:
    """Return how many tokens the model's positions allow; a very large number where its config names no limit."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or NO_LIMIT
    return limit if limit > 0 else NO_LIMIT


def attention_window(config: Any) -> int:
    """Return how many tokens attention looks back at most, by a text config; a very large number for all."""
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min([window for window in windows if isinstance(window, int) and window > 0], default=NO_LIMIT)


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
