"""What rows of a batch read: the entries that each asks for, as far as they fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from memory_adapters.base_model.decoder import execution_device
from memory_adapters.memory_slots.cached_reading import Segment
from memory_adapters.memory_slots.entries import Chooser, SlotEntry
from memory_adapters.memory_slots.placement import turn_starts

__all__ = ["Reading"]


class Reading:
    """Return what each row of token ids reads: see `Entry.choose`.

    Args:
        chooser: Chooses entries.
        embeddings: The model's input embeddings.
        opening: Tokens behind which what a user says begins, in a rendered chat.
        limit: The model's positions; entries that do not fit into them with the prompt are left out.
    """

    def __init__(self, chooser: Chooser, embeddings: nn.Module, opening: Sequence[int], limit: int) -> None:
        self.chooser, self.embeddings, self.opening, self.limit = chooser, embeddings, list(opening), limit

    @property
    def most_slots(self) -> int:
        """How many a row reads at most, as a rule: the facts about a thing, and parts of a document about it."""
        most = sorted((entry.num_slots for entry in self.chooser.entries), reverse=True)
        return sum(most if self.chooser.read == "all" else most[: self.chooser.top_k + 1])

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[list[Segment]]:
        asked = list(dict.fromkeys(map(tuple, rows)))  # beams have the same rows
        chosen = self.entries(asked)
        segments = {id(entry): self._segment(entry) for own in chosen for entry in own}
        found = {row: [segments[id(entry)] for entry in own] for row, own in zip(asked, chosen, strict=True)}
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
            if tokens + sum(one.num_positions for one in fits) + entry.num_positions < self.limit:
                fits.append(entry)
        if len(fits) < len(indices):
            warnings.warn(
                f"{len(indices) - len(fits)} of {len(indices)} entries are not read: with a prompt of {tokens} tokens "
                f"they exceed the {self.limit} positions of the model.",
                stacklevel=2,
            )
        return fits

    @torch.no_grad()
    def _segment(self, entry: SlotEntry) -> Segment:
        device = execution_device(self.embeddings)
        if entry.slots is not None:
            return Segment(entry, entry.slots.vectors.to(device))
        return Segment(entry, self.embeddings(torch.tensor(entry.input_ids, device=device)).float(), entry.kept)
