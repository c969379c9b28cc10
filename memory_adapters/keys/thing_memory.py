"""Memories that keep something of each thing that is written about: written, forgotten and routed by thing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from memory_adapters.base_model.decoder import Decoder, execution_device, find_decoder
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.modes import evaluating, own_settings
from memory_adapters.base_model.partial_forward import CACHE, positioned
from memory_adapters.base_model.tokens import pad_rows, tokenize
from memory_adapters.base_model.trial import differs, trial
from memory_adapters.items import Item, Items
from memory_adapters.keys.gate import KeyReader, KeySet, Opened, attach_keys
from memory_adapters.keys.learning import LearnedKeys
from memory_adapters.keys.thing_config import ThingConfig
from memory_adapters.keys.things import Thing, things_of
from memory_adapters.memory import Memory, Outcome
from memory_adapters.peft_layers.layers import adapter_layers
from memory_adapters.peft_layers.rollback import rollback_on_error

__all__ = ["Learned", "ThingMemory", "Values", "reader_of"]

ThingT = TypeVar("ThingT", bound=ThingConfig)


@dataclass(frozen=True)
class Values:
    """Store what things add at one place: `inner` (things, rank, in_features), `outer` (things, out_features, rank)."""

    inner: Tensor
    outer: Tensor

    def things(self, index: Sequence[int]) -> Values:
        """Return those of some things."""
        return Values(self.inner[list(index)], self.outer[list(index)])

    def with_more(self, added: Values) -> Values:
        """Return these, and others behind them."""
        parts = (self.inner, added.inner), (self.outer, added.outer)
        return Values(*(torch.cat([own, more.to(own)]) for own, more in parts))


@dataclass(frozen=True)
class Learned:
    """Store what was learned of things, in their order: their keys, their values by place, each pass's mean loss."""

    keys: LearnedKeys = field(default_factory=LearnedKeys)
    values: Mapping[str, Values] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def reader_of(memory: Memory[Any]) -> KeyReader:
    """Return the layer that reads a memory's keys."""
    every = adapter_layers(memory.model, memory.adapter_name)
    return next(layer for layer in every if isinstance(layer, KeyReader))


def _opened(memory: Memory[Any], rows: Sequence[Sequence[int]]) -> Opened:
    """Return where rows of tokens are open to the things of a memory that takes part."""
    device = execution_device(find_decoder(memory.model, memory.config.layers_path).embeddings)
    memory.model(**pad_rows(rows, device), use_cache=False)
    return reader_of(memory).pass_state.now().open[memory.adapter_name]


def opened_tokens(memory: Memory[Any], ids: Sequence[int], names: Sequence[str]) -> dict[str, list[float]]:
    """Return where a row of tokens is open to things: name of a thing to 1 or 0 at each token."""
    opened = _opened(memory, [ids])
    return {names[thing]: opened.mask[0, :, i].float().tolist() for i, thing in enumerate(opened.things.tolist())}


class ThingMemory(Memory[ThingT]):
    """Keep values of each thing, which act in a row from where it is named on."""

    @abstractmethod
    def _learn(self, things: Sequence[Thing], *, unrelated: Sequence[str] | None, progress: bool) -> Learned:
        """Learn things; what is written in the memory stays as it is."""

    @abstractmethod
    def _values(self) -> dict[str, Values]:
        """Return the values of all things by place; they share the memory's own tensors."""

    @abstractmethod
    def _set_values(self, values: Mapping[str, Values]) -> None:
        """Let the memory hold these values, by place."""

    def _keep(self, places: Sequence[int]) -> None:
        """Drop the values of all things but these."""
        self._set_values({name: own.things(places) for name, own in self._values().items()})

    def _attach_gate(self, decoder: Decoder) -> KeyReader:
        """Put what finds where rows are open on the model."""
        config = self._config
        keys = KeySet(decoder.hidden_size, config.key_owners, config.names, config.windows, held=True)
        return attach_keys(self.model, decoder, config.block, self.adapter_name, keys)

    def _try_gate(self, decoder: Decoder, remedy: str) -> None:
        """Read a few tokens with all rows open, in parts with a cache and as a whole."""
        keys, device = self._keys(), execution_device(decoder.embeddings)
        before = keys.keys, keys.key_bias, keys.owners, keys.names, keys.windows
        ids = torch.tensor([[5, 6, 7]], device=device) % decoder.vocab_size
        with trial(self.model, "does not run a gated memory in the same way with a cache and without", remedy):
            try:
                keys.keys, keys.key_bias = keys.keys.new_zeros(1, decoder.hidden_size), keys.key_bias.new_ones(1)
                keys.owners, keys.names, keys.windows = [0], [[]], [0]
                whole = self.model(input_ids=ids, use_cache=False).logits[:, -1]
                mask = torch.ones_like(ids)
                first = self.model(input_ids=ids[:, :2], **positioned(self.model, mask[:, :2]), use_cache=True)
                if first.get(CACHE) is None:
                    raise ValueError("its passes give no cache of keys and values")
                rest = {**positioned(self.model, mask, 2), CACHE: first[CACHE]}
                if differs(self.model(input_ids=ids[:, 2:], **rest, use_cache=True).logits[:, -1], whole):
                    raise ValueError("other logits")
            finally:
                keys.keys, keys.key_bias, keys.owners, keys.names, keys.windows = before

    def _keys(self) -> KeySet:
        return reader_of(self).key_set(self.adapter_name)

    def route(self, texts: str | Sequence[str]) -> list[str | None]:
        """Return, for each text, what it is about: the thing whose values act longest in it; None if none does.

        The names are those in `config.things`.
        """
        listed = [texts] if isinstance(texts, str) else list(texts)
        tokenizer = self._require_tokenizer()
        with exclusive_use(self.model), self._enabled(), torch.no_grad():
            opened = _opened(self, [tokenize(tokenizer, text) for text in listed])
        found: list[str | None] = []
        for mask in opened.mask:
            lengths = mask.sum(0)  # of what was open longest
            first = int(lengths.argmax()) if lengths.any() else None
            found.append(None if first is None else self._config.things[int(opened.things[first])])
        return found

    def _acts(self, ids: Sequence[int]) -> dict[str, list[float]] | None:
        return opened_tokens(self, ids, self._config.things)

    def _write_things(self, items: Sequence[Item], *, progress: bool, unrelated: Sequence[str] | None) -> Outcome:
        """Learn the things of which something is new, with all that is known of them; others stay as they are."""
        every, written = [*self._kept(items), *items], self.items
        held = self._held(written)
        things = things_of(every, self._require_tokenizer())
        kept = {thing.name for thing in things if held.get(thing.name) == set(thing.items)}
        new = [thing for thing in things if thing.name not in kept]
        learned = self._replace(written, every, kept, new, unrelated=unrelated, progress=progress)
        return Outcome(losses=learned.losses, notes=learned.keys.notes)

    def forget(self, items: Items) -> None:
        """Take items out again: the memory is what it would be had they never been written.

        Where all that was written about a thing is forgotten, nothing else changes, bit for bit, and no model pass is
        needed. Where something is left of it, the thing is learned anew.

        Args:
            items: One item or many, as they were written; see `items`.

        Raises:
            ValueError: If an item is not written, or a thing must be learned anew and there is no tokenizer; nothing
                is forgotten then.
        """
        with exclusive_use(self.model), own_settings():
            self._register_again()
            gone, written = set(self._listed_written(items)), self.items
            held = self._held(written)
            touched = set[Item]().union(*(own for own in held.values() if own & gone))
            left = [item for item in written if item in touched - gone]
            new = things_of(left, self._require_tokenizer()) if left else []
            every = [item for item in written if item not in gone]
            with rollback_on_error(*self._saved_state()), self._taking_part() if new else nullcontext():
                with evaluating(self.model):
                    kept = {name for name, own in held.items() if not own & gone}
                    self._replace(written, every, kept, new, unrelated=None, progress=False)
                self._config.set_items(every)

    def _held(self, written: Sequence[Item]) -> dict[str, set[Item]]:
        """Return which of the written items are about each thing."""
        config = self._config
        held: dict[str, set[Item]] = {name: set() for name in config.things}
        for item, index in zip(written, config.item_things, strict=True):
            held[config.things[index]].add(item)
        return held

    def _replace(
        self,
        written: Sequence[Item],
        items: Sequence[Item],
        kept: Collection[str],
        new: Sequence[Thing],
        *,
        unrelated: Sequence[str] | None,
        progress: bool,
    ) -> Learned:
        """Let the memory hold items instead of what is written: drop things that are not kept, and learn new ones."""
        config, keys = self._config, self._keys()
        learned = self._learn(new, unrelated=unrelated, progress=progress) if new else Learned()
        places = [i for i, name in enumerate(config.things) if name in kept]
        place_of = {old: place for place, old in enumerate(places)}
        of_item = {item: place_of[i] for item, i in zip(written, config.item_things, strict=True) if i in place_of}
        of_item |= {item: len(places) + i for i, thing in enumerate(new) for item in thing.items}
        found = learned.keys
        if len(places) < len(config.things):
            self._keep(places)
            keys.keep(places)
            config.things = [config.things[i] for i in places]
        if new:
            self._set_values({name: own.with_more(learned.values[name]) for name, own in self._values().items()})
            keys.add(found.keys, found.bias, found.owners, found.names, found.windows)
            config.things = [*config.things, *(thing.name for thing in new)]
        config.names, config.windows, config.key_owners = keys.names, keys.windows, keys.owners
        config.item_things = [of_item[item] for item in items]
        return learned
