"""Hidden states below the lowest memory do not change while it is trained: computed once, resumed from ever after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memory_adapters.decoder import Decoder, capture, execution_device
from memory_adapters.tokens import batches_of, pad_rows

__all__ = ["ReusedStates", "row_states"]


def row_states(
    model: nn.Module, decoder: Decoder, layers: Sequence[int], rows: Sequence[Sequence[int]]
) -> list[list[Tensor]]:
    """Outputs of some blocks for rows of tokens, on the CPU in the model's dtype.

    Returns:
        For each row, one tensor (tokens, hidden_size) a layer.
    """
    found: list[list[Tensor]] = [[] for _ in rows]
    device = execution_device(decoder.embeddings)
    for batch in batches_of(rows):
        states = capture(model, decoder, layers, **pad_rows([rows[i] for i in batch], device))
        for position, index in enumerate(batch):
            found[index] = [state[position, : len(rows[index])].cpu().clone() for state in states]
    return found


def returns_tuple(model: nn.Module, decoder: Decoder, layer: int) -> bool:
    """Whether block `layer` puts out a tuple that starts with the hidden state, rather than the hidden state."""
    kinds: list[bool] = []
    handle = decoder.blocks[layer].register_forward_hook(lambda _m, _a, output: kinds.append(isinstance(output, tuple)))
    try:
        with torch.no_grad():
            model(**pad_rows([[0]], execution_device(decoder.embeddings)), use_cache=False)
    finally:
        handle.remove()
    return kinds[0]


class ReusedStates:
    """Runs a model from the output of one block on, with everything up to it taken from stored states.

    The model's own `forward` runs, so masks, positions and whatever else it computes are its own; only the blocks
    below pass their input through.
    """

    def __init__(self, decoder: Decoder, layer: int) -> None:
        """Args:
        decoder: Parts of the model.
        layer: Index of the lowest block with a memory; its output, before the memory, is what is stored.
        """
        self.decoder = decoder
        self.layer = layer
        self.returns_tuple = False

    def compute(self, model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """States (tokens, hidden_size) of each row at the output of the block."""

        found = row_states(model, self.decoder, [self.layer], rows)
        self.returns_tuple = returns_tuple(model, self.decoder, self.layer)
        return [states[0] for states in found]

    @contextmanager
    def resume(self, states: Tensor) -> Iterator[None]:
        """Within this context the block at `layer` puts out `states` (batch, tokens, hidden_size)."""

        def passed_on(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if self.returns_tuple else hidden

        def stored(*_args: Any, **_kwargs: Any) -> Any:
            return (states,) if self.returns_tuple else states

        blocks = [self.decoder.blocks[i] for i in range(self.layer + 1)]
        before = [block.__dict__.get("forward") for block in blocks]
        for block in blocks[:-1]:
            block.forward = passed_on
        blocks[-1].forward = stored
        try:
            yield
        finally:
            for block, forward in zip(blocks, before, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward
