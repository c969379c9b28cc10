"""Entries as they are written: made of items, compressed, and made again of what is left."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.items import Document, Item
from memory_adapters.memory import Outcome
from memory_adapters.memory_slots.encoder import Encoder
from memory_adapters.memory_slots.entries import SlotEntry, make_entries
from memory_adapters.memory_slots.write import compress_texts, keep_keys_values
from memory_adapters.validation import cut

__all__ = ["EntryWriter", "renewed"]


class EntryWriter:
    """Make entries of items, and compress them. Those of things of which nothing changes stay the same objects.

    Args:
        encoder: Of the model.
        stack: The module that reads.
        tokenizer: The model's.
    """

    def __init__(self, encoder: Encoder, stack: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.encoder, self.stack, self.tokenizer, self.config = encoder, stack, tokenizer, encoder.config

    def write(
        self, items: Sequence[Item], held: Sequence[SlotEntry], compress: bool, steps: int, progress: bool
    ) -> tuple[list[SlotEntry], Outcome]:
        """Return the entries of items, and what came of making them.

        Args:
            items: All that is to be in the entries.
            held: The entries so far.
            compress: Whether new ones are compressed.
            steps: Most steps of refinement.
            progress: Show bars.
        """
        entries, new = self._made(items, held)
        losses: list[float] = []
        if compress and self.config.resolved_space == "kv":
            losses = self.keep(entries, new, steps, progress)
        elif compress and new:
            texts = [str(self.tokenizer.decode(list(entries[i].input_ids))) for i in new]
            made = compress_texts(self.encoder, self.tokenizer, texts, [], steps, progress)
            losses = made[0].losses
            for i, one in zip(new, made, strict=True):
                entries[i] = dataclasses.replace(entries[i], slots=one.slots)
        return entries, Outcome(losses=losses, notes=self._notes(entries, [entries[i] for i in new]))

    def forget(self, items: Sequence[Item], held: Sequence[SlotEntry], gone: Collection[Item]) -> list[SlotEntry]:
        """Return the entries of the items that are left; keys and values of those that changed are chosen anew.

        Raises:
            NotImplementedError: If an entry that changes was compressed to slots.
        """
        entries, new = self._made(items, held)
        kept = set(map(id, entries))
        changed = [entry for entry in held if id(entry) not in kept and set(entry.items) - set(gone)]
        if torn := [entry for entry in changed if entry.slots is not None]:
            raise NotImplementedError(
                f"The entry {torn[0].title!r} is compressed, and holds items that are to stay: forget all of its "
                "`items`, and write again what is to stay."
            )
        steps = {item: entry.kept.refine_steps for entry in changed if entry.kept for item in entry.items}
        for i in new:
            if own := [steps[item] for item in entries[i].items if item in steps]:
                self.keep(entries, [i], max(own), progress=False)
        return entries

    def keep(self, entries: list[SlotEntry], places: Sequence[int], steps: int, progress: bool) -> list[float]:
        """Choose keys and values of some entries; return the loss before each step of the first that was refined."""
        texts = [(entries[i].title, entries[i].input_ids) for i in places]
        found = keep_keys_values(self.encoder, self.stack, self.tokenizer, texts, steps, progress)
        for i, (kept, _) in zip(places, found, strict=True):
            entries[i] = dataclasses.replace(entries[i], kept=kept)
        return next((losses for _, losses in found if losses), [])

    def _made(self, items: Sequence[Item], held: Sequence[SlotEntry]) -> tuple[list[SlotEntry], list[int]]:
        """Return the entries of items, and the places of those that are new."""
        entries = make_entries(items, self.tokenizer, self.config.part_tokens, held)
        known = set(map(id, held))
        return entries, [i for i, entry in enumerate(entries) if id(entry) not in known]

    def _notes(self, entries: Sequence[SlotEntry], new: Sequence[SlotEntry]) -> list[str]:
        """Return how many entries were made, and by which names texts are read, or that nothing finds them."""
        tokens, slots = (sum(getattr(entry, count) for entry in new) for count in ("num_tokens", "num_slots"))
        notes = [f"{len(new)} entries made of {tokens:,} tokens" + (f", in {slots:,} slots" if slots < tokens else "")]
        if self.config.read != "names":
            return notes
        unnamed = (
            entry.names[0]
            for entry in new
            for item in entry.items[:1]
            if entry.names and isinstance(item, Document) and item.subject is None
        )
        names = dict.fromkeys(repr(str(self.tokenizer.decode(list(ids))).strip()) for ids in unnamed)
        if names:
            notes.append(
                f"a text is read where a prompt has the name that it has most often, {cut(', '.join(names))}: give "
                "another with `Document(text, subject=...)`"
            )
        if unread := [entry for entry in entries if not entry.names and not entry.terms]:
            notes.append(
                f"{len(unread)} entries have no name that a prompt could have, such as {unread[0].title!r}: they are "
                "read with `read='bm25'`, or where `use` is given them"
            )
        return notes


def renewed(entries: Sequence[SlotEntry], writer: EntryWriter | None, adapter_name: str) -> list[SlotEntry]:
    """Return entries with the keys and values of weights that have changed; without any if there is no tokenizer."""
    found = list(entries)
    old = [i for i, entry in enumerate(entries) if entry.kept is not None]
    if not old:
        return found
    refined = any(entry.kept is not None and entry.kept.refine_steps for entry in entries)
    if writer is not None:
        writer.keep(found, old, 0, progress=False)
    else:
        for i in old:
            found[i] = dataclasses.replace(found[i], kept=None)
    if refined or writer is None:
        how = "chosen anew, without refinement" if writer else "dropped: their texts are read whole"
        warnings.warn(
            f"The weights of the model have changed: keys and values of {len(old)} entries of {adapter_name!r} were "
            f"{how}. Write the items again to compress them as before.",
            stacklevel=4,
        )
    return found
