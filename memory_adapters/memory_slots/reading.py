"""What rows of a batch read: the embeddings of the entries that each asks for, as far as they fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memory_adapters.base_model.decoder import execution_device
from memory_adapters.memory_slots.entries import Chooser, SlotEntry
from memory_adapters.memory_slots.placement import turn_starts

__all__ = ["Reading"]


class Reading:
    """Return what each row of token ids reads (slots, embedding_size), float32: see `Entry.choose`.

    Args:
        chooser: Chooses entries.
        embeddings: The model's input embeddings.
        opening: Tokens behind which what a user says begins, in a rendered chat.
        limit: The model's positions; entries that do not fit into them with the prompt are left out.
    """

    def __init__(self, chooser: Chooser, embeddings: nn.Module, opening: Sequence[int], limit: int) -> None:
        self.chooser, self.embeddings, self.opening, self.limit = chooser, embeddings, list(opening), limit

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        asked = list(dict.fromkeys(map(tuple, rows)))  # beams have the same rows
        found = {row: self._vectors(own) for row, own in zip(asked, self.entries(asked), strict=True)}
        return [found[tuple(row)] for row in rows]

    def entries(self, rows: Sequence[Sequence[int]]) -> list[list[SlotEntry]]:
        """Return the entries that each row of token ids reads."""
        starts = [start or 0 for start in turn_starts(rows, self.opening)]
        chosen = self.chooser.choose(rows, starts)
        return [self._fitting(len(row), own) for row, own in zip(rows, chosen, strict=True)]

    def _fitting(self, tokens: int, indices: Sequence[int]) -> list[SlotEntry]:
        """Return those of some entries that fit into the context with a prompt of so many tokens."""
        fits: list[SlotEntry] = []
        for entry in (self.chooser.entries[i] for i in indices):
            if tokens + sum(one.num_slots for one in fits) + entry.num_slots < self.limit:
                fits.append(entry)
        if len(fits) < len(indices):
            warnings.warn(
                f"{len(indices) - len(fits)} of {len(indices)} entries are not read: with a prompt of {tokens} tokens "
                f"they exceed the {self.limit} positions of the model.",
                stacklevel=2,
            )
        return fits

    @torch.no_grad()
    def _vectors(self, entries: Sequence[SlotEntry]) -> Tensor:
        """Return what is read of entries: their slots, or their texts' embeddings."""
        device = execution_device(self.embeddings)
        parts = [
            self.embeddings(torch.tensor(entry.input_ids, device=device)).float()
            if entry.slots is None
            else entry.slots.vectors.to(device)
            for entry in entries
        ]
        return torch.cat(parts) if parts else torch.zeros(0, 1, device=device)
