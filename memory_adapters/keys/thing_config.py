"""The config of memories that keep something of each thing that is written about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from memory_adapters.base_model.decoder import Decoder, resolve_layers
from memory_adapters.config import STATE, TRAINING, MemoryConfig
from memory_adapters.keys.gate import check_keys, key_shapes
from memory_adapters.validation import check_flag, check_number, checked_layers, shown

__all__ = ["ThingConfig"]


@dataclass
class ThingConfig(MemoryConfig):
    """Configure a memory of things, which are found by their keys.

    Attributes:
        key_layer: Block that the keys are compared with: an index, or a depth in [0, 1]. Resolved to an index when the
            memory is injected.
        key_threshold: Similarity to a key (1 at the key, about 0 on unrelated text) above which a token is near it.
        things: What is written about, by name. Filled in by `write`.
        names: For each of `things`, the token ids of its spellings. Filled in by `write`.
        windows: For each of `things`, over how many tokens more than these a text may spread them. Filled in by
            `write`.
        item_things: For each of `items`, the index in `things` of what it is about. Filled in by `write`.
        key_owners: For each key, the index in `things` of what it is of. Filled in by `write`.
        num_prefixes: Varied prefixes behind which a fact is trained, beside its bare prompt.
        phrasings: Whether facts are also trained as answers to questions, their own or made of their prompts, in the
            chat template, where there is one.
        num_others: Questions about each thing that nothing written answers; the model's own answers to them are trained
            too. Without these a thing of which one fact is written answers every question with it.
        max_length: Longest row in tokens; longer documents are split into windows. None for the model's context.
        seed: Of the initialisation, the data order and the sampled text.
    """

    key_layer: int | float = 0.18
    key_threshold: float = 0.6
    things: list[str] = field(default_factory=list, repr=False, metadata=STATE)
    names: list[list[list[int]]] = field(default_factory=list, repr=False, metadata=STATE)
    windows: list[int] = field(default_factory=list, repr=False, metadata=STATE)
    item_things: list[int] = field(default_factory=list, repr=False, metadata=STATE)
    key_owners: list[int] = field(default_factory=list, repr=False, metadata=STATE)
    num_prefixes: int = field(default=2, metadata=TRAINING)
    phrasings: bool = field(default=True, metadata=TRAINING)
    num_others: int = field(default=8, metadata=TRAINING)
    max_length: int | None = field(default=None, metadata=TRAINING)
    seed: int = field(default=0, metadata=TRAINING)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(checked_layers(self.key_layer)) != 1:
            raise ValueError(f"`key_layer` must be one block or depth, got {shown(self.key_layer)}.")
        check_number("key_threshold", self.key_threshold, low=0, high=1, open_low=True)
        _check_things(self.things, self.names, self.windows, self.item_things, self.key_owners)
        check_number("num_prefixes", self.num_prefixes, low=0, integer=True)
        check_flag("phrasings", self.phrasings)
        check_number("num_others", self.num_others, low=0, integer=True)
        if self.max_length is not None:
            check_number("max_length", self.max_length, low=2, integer=True)
        check_number("seed", self.seed, low=0, integer=True)

    @property
    def block(self) -> int:
        """The index of the block that keys are compared with, once resolved."""
        assert isinstance(self.key_layer, int)
        return self.key_layer

    def resolve_key_layer(self, decoder: Decoder) -> None:
        """Fill in the block of the keys."""
        (self.key_layer,) = resolve_layers(checked_layers(self.key_layer), decoder.num_layers)[:1]

    def check_above_keys(self, decoder: Decoder, layers: Sequence[int]) -> None:
        """Raise a `ValueError` unless blocks, lowest first, are all above that of the keys."""
        if self.key_layer == decoder.num_layers - 1:
            raise ValueError(f"`key_layer={self.key_layer}` is the last block: choose one with blocks above it.")
        if layers[0] <= self.block:
            raise ValueError(
                f"`layers` has block {layers[0]}, which must be above `key_layer`, which is block "
                f"{self.key_layer} of {decoder.num_layers}."
            )

    def key_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return names and shapes of the keys' tensors."""
        return key_shapes(self.key_owners, decoder.hidden_size)


def _check_things(things: Any, names: Any, windows: Any, item_things: Any, key_owners: Any) -> None:
    """Raise a `ValueError` unless things have names, which are lists of lists of token ids, and indices are theirs."""
    if not isinstance(things, list) or not all(isinstance(one, str) for one in things):
        raise ValueError(f"`things` must be a list of names, got {shown(things)}.")
    check_keys(names, key_owners)
    if len(names) != len(things):
        raise ValueError(f"`names` must have a list of lists of token ids for each of `things`, got {shown(names)}.")
    counts = isinstance(windows, list) and all(type(i) is int and i >= 0 for i in windows)
    if not counts or len(windows) != len(things):
        raise ValueError(f"`windows` must have a number for each of `things`, got {shown(windows)}.")
    if not isinstance(item_things, list) or not all(type(i) is int and 0 <= i < len(things) for i in item_things):
        raise ValueError(f"`item_things` must be a list of indices of `things`, got {shown(item_things)}.")
