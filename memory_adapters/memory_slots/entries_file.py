"""The file of a memory's entries: their tokens and names, and the keys and values that are kept of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory_adapters.files.strict_json import parse_json
from memory_adapters.files.tensors import read_metadata, read_tensors, write_tensors
from memory_adapters.items import Item
from memory_adapters.memory_slots.entries import SlotEntry
from memory_adapters.memory_slots.keys_values import KeysValues
from memory_adapters.memory_slots.slots import MemorySlots
from memory_adapters.validation import check_number, shown

__all__ = ["ENTRIES_FILE", "load_entries", "save_entries"]

ENTRIES_FILE = "entries.safetensors"
NAME = "entries"
FORMAT = "memory-adapters entries 1"
LISTS = ("input_ids", "items", "names", "terms", "objects")  # lists of numbers, of each entry
PARTS = ("keys", "values", "places")


def save_entries(path: Path, entries: Sequence[SlotEntry], items: Sequence[Item]) -> None:
    """Write entries, but for the slots of an encoder, to one safetensors file.

    Args:
        path: The file.
        entries: At least one.
        items: All that is written: an entry names its own by their place.
    """
    place = {item: i for i, item in enumerate(items)}
    tensors: dict[str, Tensor] = {}
    lists: dict[str, list[Sequence[int]]] = {
        "input_ids": [entry.input_ids for entry in entries],
        "items": [[place[item] for item in entry.items] for entry in entries],
        "names": [_flat(entry.names) for entry in entries],
        "terms": [_flat([_flat(term) for term in entry.terms]) for entry in entries],
        "objects": [_flat(entry.objects) for entry in entries],
    }
    for name, rows in lists.items():
        tensors[name] = torch.tensor([number for row in rows for number in row], dtype=torch.int32)
        tensors[f"{name}.lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    for i, entry in enumerate(entries):
        if entry.kept is not None:
            for part in PARTS:
                tensors[f"{part}.{i}"] = torch.cat([block.flatten().cpu() for block in getattr(entry.kept, part)])
    about = {
        "format": FORMAT,
        "titles": [entry.title for entry in entries],
        "spans": {str(i): one.slots.num_spans for i, one in enumerate(entries) if one.slots is not None},
        "kept": {str(i): _about(one.kept) for i, one in enumerate(entries) if one.kept is not None},
    }
    write_tensors(path, tensors, {NAME: json.dumps(about, sort_keys=True)})


def _about(kept: KeysValues) -> dict[str, Any]:
    blocks = zip(kept.keys, kept.values, strict=True)
    return {
        "prefix": list(kept.prefix),
        "refine_steps": kept.refine_steps,
        "num_kept": kept.num_kept,
        "blocks": [[len(keys), keys.shape[2], values.shape[2]] for keys, values in blocks],  # heads, sizes of a head
    }


def load_entries(path: Path, items: Sequence[Item], slots: MemorySlots | None, num_layers: int) -> list[SlotEntry]:
    """Undo `save_entries`.

    Args:
        path: The file.
        items: What is written.
        slots: Those of all entries that an encoder compressed, one after the other.
        num_layers: Blocks of the model.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged, or is of other items, slots, or another model.
    """
    shapes, metadata = read_metadata(path)
    try:
        about = parse_json(metadata[NAME])
        if about["format"] != FORMAT:
            raise ValueError(f"unknown format {shown(about['format'])}: update memory-adapters")
        titles = about["titles"]
        kept = {int(i): _Kept.read(fields, num_layers) for i, fields in about["kept"].items()}
        integers = {name for own in LISTS for name in (own, f"{own}.lengths")} | {f"places.{i}" for i in kept}
        floats = {f"{part}.{i}" for i in kept for part in PARTS[:2]}
        tensors = read_tensors(path, {name: torch.Size(shapes[name]) for name in integers | floats}, integers)
        input_ids, owned, names, terms, objects = (_rows(tensors, name, len(titles)) for name in LISTS)
        if any(not 0 <= i < len(items) for row in owned for i in row):
            raise ValueError("items that are not written: save the memory again")
        if not all(isinstance(title, str) for title in titles) or not all(input_ids):
            raise ValueError("an entry without a title or tokens")
        spans = iter([] if slots is None else slots.split())
        of_slots = {int(i): [next(spans) for _ in range(count)] for i, count in about["spans"].items()}
        if next(spans, None) is not None:
            raise ValueError("other slots than the file of slots: save the memory again")
        return [
            SlotEntry(
                title,
                tuple(items[place] for place in owned[i]),
                tuple(input_ids[i]),
                MemorySlots.concatenate(of_slots[i]) if i in of_slots else None,
                kept[i].keys_values([tensors[f"{part}.{i}"] for part in PARTS], len(input_ids[i]))
                if i in kept
                else None,
                tuple(map(tuple, _lists(names[i]))),
                tuple(tuple(map(tuple, _lists(term))) for term in _lists(terms[i])),
                tuple(map(tuple, _lists(objects[i]))),
            )
            for i, title in enumerate(titles)
        ]
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, StopIteration, RuntimeError) as error:
        raise ValueError(f"`{path}` is not a file of entries ({error}).") from error


@dataclass(frozen=True)
class _Kept:
    """Store what the header says of an entry's keys and values: see `_about`."""

    prefix: tuple[int, ...]
    refine_steps: int
    num_kept: int
    blocks: list[list[int]]

    @classmethod
    def read(cls, fields: Mapping[str, Any], num_layers: int) -> _Kept:
        numbers = [*fields["prefix"], fields["refine_steps"], fields["num_kept"]]
        for number in [*numbers, *(one for block in fields["blocks"] for one in block)]:
            check_number(NAME, number, low=0, integer=True)
        if len(fields["blocks"]) != num_layers:
            raise ValueError(f"keys and values of {len(fields['blocks'])} blocks, for a model of {num_layers}")
        return cls(tuple(fields["prefix"]), fields["refine_steps"], fields["num_kept"], fields["blocks"])

    def keys_values(self, parts: Sequence[Tensor], tokens: int) -> KeysValues:
        keys, values, places = parts
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < tokens:
            raise ValueError("places that are not in the text")
        heads = [(count, self.num_kept) for count, *_ in self.blocks]
        return KeysValues(
            _cut(keys, [(*own, size) for own, (_, size, _) in zip(heads, self.blocks, strict=True)]),
            _cut(values, [(*own, size) for own, (*_, size) in zip(heads, self.blocks, strict=True)]),
            _cut(places, heads),
            self.prefix,
            self.refine_steps,
        )


def _cut(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    parts = flat.split([torch.Size(shape).numel() for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _rows(tensors: Mapping[str, Tensor], name: str, count: int) -> list[list[int]]:
    """Return one list of numbers of each entry."""
    flat, lengths = tensors[name].tolist(), tensors[f"{name}.lengths"].tolist()
    if len(lengths) != count or any(length < 0 for length in lengths) or sum(lengths) != len(flat):
        raise ValueError(f"`{name}` of other entries")
    ends = list(accumulate(lengths))
    return [flat[end - length : end] for length, end in zip(lengths, ends, strict=True)]


def _flat(lists: Iterable[Sequence[int]]) -> list[int]:
    """Return lists of numbers as one, each behind its length."""
    return [number for own in lists for number in (len(own), *own)]


def _lists(flat: Sequence[int]) -> list[Sequence[int]]:
    """Undo `_flat`."""
    found, place = [], 0
    while place < len(flat):
        end = place + 1 + flat[place]
        if not place < end <= len(flat):
            raise ValueError("names that end too late")
        found.append(flat[place + 1 : end])
        place = end
    return found
