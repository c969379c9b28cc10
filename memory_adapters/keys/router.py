"""Route each row of a batch to the memory whose keys its prompt meets, or to none.

At the first block of the routed memories each is asked how near the input comes to its keys, the highest of
max_k (s_k(x) − θ_k) over the input's tokens. The nearest memory takes part, at all of its blocks, for the rest of the
input and for what is generated from it. Where none comes above its thresholds θ, which were learned from what was
written and from unrelated text, none takes part, and the model is bit for bit what it is without them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import base_model, execution_device, find_decoder
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.partial_forward import CACHE
from memory_adapters.base_model.tokens import pad_rows, tokenize
from memory_adapters.inject import BASE_ROW, memories
from memory_adapters.peft_layers.layers import MemoryLayer, adapter_layers

__all__ = ["KeyedLayer", "MemoryRouter", "route_memories"]

ROUTE = "_memory_route"  # attribute of a cache: the adapter of each of its rows


class KeyedLayer(MemoryLayer):
    """Hold adapters that may have keys, and so can be routed."""

    @abstractmethod
    def has_keys(self, adapter_name: str) -> bool:
        """Return whether the adapter keeps keys of what was written."""

    @abstractmethod
    def nearness(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return max_k (s_k(x) − θ_k) / ramp at each token of x (batch, tokens, hidden_size): above 0 near a key."""


@dataclass
class _Pass:
    """Store whether a pass in progress trains, its attention mask (batch, tokens), and its route once known."""

    training: bool
    mask: Tensor | None
    route: list[str] | None


class MemoryRouter:
    """Let, within this context, the one memory that fits a row's input take part, or none; see `route_memories`.

    Attributes:
        names: The routed memories.
    """

    def __init__(
        self, model: PreTrainedModel, names: Sequence[str], first: KeyedLayer, layers_path: str | None
    ) -> None:
        self.model, self.names, self.first = model, tuple(names), first
        self.decoder = find_decoder(model, layers_path)
        self._layers = [layer for layer in adapter_layers(model) if isinstance(layer, KeyedLayer)]
        self._passes: dict[int, list[_Pass]] = {}  # of each thread, the outermost first
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> MemoryRouter:
        with exclusive_use(self.model):
            if any(layer.router is not None for layer in self._layers):
                raise ValueError("`model` is within `route_memories` already: leave that context first.")
            stack = self.model.get_submodule(self.decoder.stack_path)
            self._handles = [
                stack.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
                stack.register_forward_hook(self._end, always_call=True),
            ]
            for layer in self._layers:
                layer.router = self
        return self

    def __exit__(self, *_: object) -> None:
        with exclusive_use(self.model):
            for handle in self._handles:
                handle.remove()
            for layer in self._layers:
                layer.router = None

    def choose(self, texts: str | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
        """Return which memory takes part for each text; None where none does.

        Raises:
            RuntimeError: If the context was not entered.
        """
        if self.first.router is not self:
            raise RuntimeError("`route_memories` does nothing until it is entered: `with route_memories(model) as r`.")
        listed = [texts] if isinstance(texts, str) else list(texts)
        inputs = pad_rows([tokenize(tokenizer, text) for text in listed], execution_device(self.decoder.embeddings))
        with torch.no_grad():
            found = getattr(self.model(**inputs, use_cache=True)[CACHE], ROUTE)
        return [None if name == BASE_ROW else name for name in found]

    def read(self, layer: MemoryLayer, x: Tensor) -> tuple[tuple[str, ...], list[str] | None]:
        """Return which memories are routed in this pass, and the one of each row; see `RowRouter`.

        The choice is made where x (batch, tokens, hidden_size) is the output of the first routed block of a new input.
        """
        now = self._passes.get(get_ident(), [_Pass(False, None, None)])[-1]
        if now.training:
            return (), None
        if layer is self.first and now.route is None:
            now.route = self._choose_rows(x, now.mask)
        return self.names, now.route

    def _choose_rows(self, x: Tensor, mask: Tensor | None) -> list[str]:
        names = [name for name in self.names if name in self.first._active_adapter and self.first.has_keys(name)]
        with torch.no_grad():
            near = [self.first.nearness(name, x.float()) for name in names]
            closed = torch.zeros(x.shape[:2], device=x.device, dtype=torch.float32)
            best = torch.stack([closed, *near])  # (1 + memories, batch, tokens)
            if mask is not None:
                tokens = min(mask.shape[1], x.shape[1])
                best = best[:, :, -tokens:].masked_fill(mask[None, :, -tokens:].to(x.device) == 0, 0)
            chosen = best.amax(-1).argmax(0).tolist()
        return [[BASE_ROW, *names][i] for i in chosen]

    def _begin(self, stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a pass: a cache that is being continued keeps its route; another input is read anew."""
        cache = kwargs.get(CACHE)
        continued = cache is not None and cache.get_seq_length() > 0
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        route = getattr(cache, ROUTE, [BASE_ROW]) if continued else None
        self._passes.setdefault(get_ident(), []).append(_Pass(stack.training, mask, route))

    def _end(self, stack: PreTrainedModel, args: tuple[Any, ...], output: Any) -> None:
        """End a pass, also one that failed: the route is kept with the cache."""
        own = self._passes.get(get_ident())
        if own is None:  # it was refused before it began
            return
        ended = own.pop()
        if not own:
            del self._passes[get_ident()]
        cache = getattr(output, CACHE, None)
        if cache is not None and ended.route is not None:
            setattr(cache, ROUTE, ended.route)


def route_memories(model: PreTrainedModel | PeftModel, adapter_names: Sequence[str] | None = None) -> MemoryRouter:
    """Route each row to the one memory whose keys its prompt meets, or to none, within a `with` statement.

    Nothing happens until the context is entered. Other adapters, and memories that are not named, are as active as
    they were. An inactive memory is never chosen. In training mode nothing is routed. With `use_cache=False`,
    `generate` chooses anew at every token, from all text so far.

    Args:
        model: A model with memories that keep keys, or a PeftModel around one.
        adapter_names: The memories to choose from; all that keep keys by default.

    Raises:
        ValueError: If a name is no memory that can be routed, one has no keys, or they do not begin at the same block.
    """
    base = base_model(model)
    held = {name: memory.tuner_layers() for name, memory in memories(base).items()}
    keyed = {name: [layer for layer in layers if isinstance(layer, KeyedLayer)] for name, layers in held.items()}
    known = {name: layers for name, layers in keyed.items() if len(layers) == len(held[name])}
    names = list(known) if adapter_names is None else list(adapter_names)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"`adapter_names` has {unknown}, but the memories that can be routed are {sorted(known)}.")
    if not names:
        raise ValueError("`model` has no memory that can be routed: inject one that keeps keys.")
    if keyless := [name for name in names if not known[name][0].has_keys(name)]:
        raise ValueError(f"`adapter_names` has {keyless}, which keep no keys: set `router_keys=True`.")
    places = {id(module): path for path, module in base.named_modules()}
    firsts = {name: places[id(known[name][0])].rpartition(".")[0] for name in names}
    if len(set(firsts.values())) > 1:
        raise ValueError(f"`adapter_names` must begin at the same block to be compared, but begin at {firsts}.")
    return MemoryRouter(base, names, known[names[0]][0], memories(base)[names[0]].config.layers_path)
