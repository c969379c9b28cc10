"""Cache hidden states below the lowest memory, which do not change while it is trained, and reuse them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.partial_forward import block_tuple_length, capture, resumed
from memory_adapters.base_model.tokens import batches_of, pad_rows

__all__ = ["ReusedStates", "row_states"]


def row_states(
    model: PreTrainedModel, decoder: Decoder, layers: Sequence[int], rows: Sequence[Sequence[int]]
) -> list[list[Tensor]]:
    """Return the outputs of some blocks for rows of tokens, on the CPU in the model's dtype.

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


class ReusedStates:
    """Run a model from the output of one block on, with everything up to it taken from stored states.

    The model's own `forward` runs, so masks, positions and whatever else it computes are its own; only the blocks
    below pass their input through.

    Args:
        decoder: Parts of the model.
        layer: Index of the lowest block with a memory; its output, before the memory, is what is stored.
    """

    def __init__(self, decoder: Decoder, layer: int) -> None:
        self.decoder = decoder
        self.layer = layer
        self.tuple_length = 0

    def compute(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the states (tokens, hidden_size) of each row at the output of the block."""

        found = row_states(model, self.decoder, [self.layer], rows)
        self.tuple_length = block_tuple_length(model, self.decoder, self.layer)
        return [states[0] for states in found]

    def resume(self, states: Tensor) -> AbstractContextManager[None]:
        """Let the block at `layer`, within this context, put out `states` (batch, tokens, hidden_size)."""
        return resumed(self.decoder, self.layer, states, tuple_length=self.tuple_length)
