"""A router among residual memories: the one that fits the input speaks, or none.

At the first block of the routed memories each is asked how near the input comes to its keys, the highest of
max_k (s_k(x) − θ_k) over the input's tokens. The nearest memory speaks, at all of its blocks, for the rest of the
input and for what is generated from it. Where none comes above its thresholds θ, which were learned from what was
written and from unrelated text, all stay silent, and the model is bit for bit what it is without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from memory_adapters.base_model.decoder import execution_device, find_decoder
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.partial_forward import CACHE
from memory_adapters.base_model.tokens import pad_rows, tokenize
from memory_adapters.composition.activation import BASE_ROW
from memory_adapters.inject import base_model, memories
from memory_adapters.residual_mlp.layer import ResidualLayer, residual_layers
from memory_adapters.residual_mlp.memory import ResidualMemory

__all__ = ["MemoryRouter", "route_memories"]

MARK = "_memory_route"


@dataclass
class _Pass:
    """A pass in progress: whether in training, its attention mask (batch, tokens), and the choice once it is made."""

    training: bool
    mask: Tensor | None
    route: list[str] | None


class MemoryRouter:
    """Made by `route_memories`. Use it in a `with` statement, or end it with `remove`.

    Attributes:
        names: The routed memories.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], layers_path: str | None) -> None:
        self.model, self.names = model, tuple(names)
        self.decoder = find_decoder(model, layers_path)
        self.layers = residual_layers(model)
        self.passes: dict[int, list[_Pass]] = {}  # of each thread, the outermost first
        stack = model.get_submodule(self.decoder.stack_path)
        self.handles = [
            stack.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            stack.register_forward_hook(self._end, always_call=True),
        ]
        for layer in self.layers:
            layer.router = self

    @property
    def first(self) -> ResidualLayer | None:
        """Where the choice is made: the first block of the routed memories."""
        return next((x for x in self.layers if any(name in x.memory_adapter_mlp for name in self.names)), None)

    def choose(self, texts: str | Sequence[str], tokenizer: Any) -> list[str | None]:
        """Which memory would speak for each text; None where all stay silent."""
        listed = [texts] if isinstance(texts, str) else list(texts)
        inputs = pad_rows([tokenize(tokenizer, text) for text in listed], execution_device(self.decoder.embeddings))
        with torch.no_grad():
            found = getattr(self.model(**inputs, use_cache=True)[CACHE], MARK)
        return [None if name == BASE_ROW else name for name in found]

    def remove(self) -> None:
        """Stop routing: every active memory takes part again."""
        with exclusive_use(self.model):
            for handle in self.handles:
                handle.remove()
            for layer in self.layers:
                layer.router = None

    def __enter__(self) -> MemoryRouter:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass: a cache that is being continued keeps its route; another input is read anew."""
        cache = kwargs.get(CACHE)
        continued = cache is not None and cache.get_seq_length() > 0
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        route = getattr(cache, MARK, [BASE_ROW]) if continued else None
        self.passes.setdefault(get_ident(), []).append(_Pass(stack.training, mask, route))

    def read(self, layer: ResidualLayer, x: Tensor) -> tuple[tuple[str, ...], list[str] | None]:
        """Which memories are routed in this pass, and which of them each row gets.

        The choice is made where x (batch, tokens, hidden_size) is the output of the first routed block of a new input.
        """
        now = self.passes.get(get_ident(), [_Pass(False, None, None)])[-1]
        if now.training:
            return (), None
        if layer is self.first and now.route is None:
            now.route = self._route(layer, x, now.mask)
        return self.names, now.route

    def _route(self, layer: ResidualLayer, x: Tensor, mask: Tensor | None) -> list[str]:
        names = [n for n in self.names if n in layer._active_adapter and n in layer.memory_adapter_mlp]
        with torch.no_grad():
            near: list[Any] = [layer.memory_adapter_mlp[name].nearness(x.float()) for name in names]  # type: ignore[operator]
            best = torch.stack([torch.zeros(x.shape[:2], device=x.device), *near])
            if mask is not None:
                tokens = min(mask.shape[1], x.shape[1])
                best = best[:, :, -tokens:].masked_fill(mask[None, :, -tokens:].to(x.device) == 0, 0)
            chosen = best.amax(-1).argmax(0).tolist()
        return [[BASE_ROW, *names][i] for i in chosen]

    def _end(self, stack: Any, args: tuple[Any, ...], output: Any) -> None:
        """After a pass, or one that failed: the route travels with the cache."""
        own = self.passes.get(get_ident())
        if own is None:  # it was refused before it began
            return
        ended = own.pop()
        if not own:
            del self.passes[get_ident()]
        cache = getattr(output, CACHE, None)
        if cache is not None and ended.route is not None:
            setattr(cache, MARK, ended.route)


def route_memories(model: nn.Module, adapter_names: Sequence[str] | None = None) -> MemoryRouter:
    """Let the one residual memory that fits the input speak, or none.

    Other adapters, and memories that are not named, are as active as they were. An inactive memory is never chosen.
    In training mode nothing is routed. With `use_cache=False`, `generate` chooses anew at every token, from all text
    so far.

    Args:
        model: A model with residual memories, or a PeftModel around one.
        adapter_names: The memories to choose from; all residual ones by default.

    Raises:
        ValueError: If a name is no residual memory, one has no keys, they do not begin at the same block, or there is a
            router already.
    """
    base = base_model(model)
    known = {name: m for name, m in memories(base).items() if isinstance(m, ResidualMemory)}
    names = list(known) if adapter_names is None else list(adapter_names)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"`adapter_names` has {unknown}, but the residual memories are {sorted(known)}.")
    if not names:
        raise ValueError("`model` has no residual memory to route: inject one with `MemoryAdapterConfig`.")
    if keyless := [name for name in names if not known[name].config.has_keys]:
        raise ValueError(f"`adapter_names` has {keyless}, which keep no keys: inject them with `router_keys=True`.")
    firsts = {name: known[name].config.depths[0] for name in names}
    if len(set(firsts.values())) > 1:
        raise ValueError(f"`adapter_names` must begin at the same block to be compared, but begin at {firsts}.")
    if any(layer.router is not None for layer in residual_layers(base)):
        raise ValueError("`model` has a router already: `remove` it first.")
    with exclusive_use(base):
        return MemoryRouter(base, names, known[names[0]].config.layers_path)
