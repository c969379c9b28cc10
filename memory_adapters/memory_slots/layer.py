"""The slots that memories let a model read, held on the decoder stack by adapter name."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

__all__ = ["Entry", "SlotReader"]


class Entry(nn.Module):
    """The slots that one memory lets the model read.

    Attributes:
        vectors: (rows, slots, embedding_size); one row serves every row of a batch.
        mask: (rows, slots), 0 where a row has fewer slots (on the left); buffers, so that they move with the model.
    """

    vectors: Tensor
    mask: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(1, 0, width), persistent=False)
        self.register_buffer("mask", torch.zeros(1, 0, dtype=torch.long), persistent=False)


class SlotReader(nn.Module, BaseTunerLayer):
    """Slots of all memories on a model, by adapter name."""

    adapter_layer_names = ("slot_entries",)
    other_param_names = ()
    precedes_tokens = True

    def __init__(self) -> None:
        super().__init__()
        self.slot_entries = nn.ModuleDict()
        self.rows: list[str] | None = None
        self.kept: tuple[Any, list[tuple[Tensor, Tensor]]] = (None, [])
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []

    def get_base_layer(self) -> nn.Module:
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Slots go where the embeddings are when they are put in."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: slots are inputs, not weights."""

    def unmerge(self) -> None:
        """Does nothing, as `merge` did nothing."""

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Vectors (rows, slots, width) and mask of the active memories, one after the other; None if there is none."""
        if self._disable_adapters:
            return None
        if self.rows is not None:
            return self._read_rows(self.rows)
        names = [name for name in self._active_adapter if name in self.slot_entries]
        entries: list[Any] = [self.slot_entries[name] for name in names]
        entries = [entry for entry in entries if entry.vectors.shape[1]]
        if not entries:
            return None
        rows = max(len(entry.vectors) for entry in entries)
        vectors = torch.cat([entry.vectors.expand(rows, -1, -1) for entry in entries], 1)
        return vectors, torch.cat([entry.mask.expand(rows, -1) for entry in entries], 1)

    def _read_rows(self, rows: list[str]) -> tuple[Tensor, Tensor] | None:
        known = dict(self.slot_entries.items())
        entries: list[Any] = [known.get(name) for name in rows]
        longest = max((entry.vectors.shape[1] for entry in entries if entry is not None), default=0)
        if longest == 0:
            return None
        some = next(entry for entry in entries if entry is not None)
        vectors = some.vectors.new_zeros(len(rows), longest, some.vectors.shape[2])
        mask = some.mask.new_zeros(len(rows), longest)
        for i, entry in enumerate(entries):
            if entry is not None:
                if len(entry.vectors) > 1:
                    raise ValueError(
                        f"`adapter_names` has {rows[i]!r}, which reads {len(entry.vectors)} rows of slots of its own: "
                        "let it `use` one, or leave rows to it alone."
                    )
                count = entry.vectors.shape[1]
                vectors[i, longest - count :], mask[i, longest - count :] = entry.vectors[0], entry.mask[0]
        return vectors, mask

    def state(self, stack: nn.Module) -> tuple[Any, ...]:
        """What the kept keys and values depend on: slots, weights, and which adapters take part.

        Tensors are held, so that none that is new can be taken for one that is gone. Adapters that take no part are
        not looked at, however many there are.
        """
        names = (
            list(self.rows) if self.rows is not None else [n for n in self._active_adapter if n in self.slot_entries]
        )
        entries: list[Any] = [self.slot_entries[name] for name in names if name in self.slot_entries]
        tensors: list[Tensor] = [entry.vectors for entry in entries]
        settings: list[Any] = []
        self._collect(stack, tensors, settings)
        held = [_Held(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        return (names, held, settings)

    def _collect(self, module: Any, tensors: list[Tensor], settings: list[Any]) -> None:
        tensors += [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        children = module._modules
        if isinstance(module, BaseTunerLayer):
            active = [] if module.disable_adapters else list(module.active_adapters)
            factors = {**getattr(module, "scaling", {}), **getattr(module, "weights", {})}
            settings.append((active, getattr(module, "rows", None), [factors.get(name) for name in active]))
            for place in module.adapter_layer_names:
                for name in active:
                    part = getattr(module, place)[name] if name in getattr(module, place, {}) else None
                    if isinstance(part, nn.Module):
                        self._collect(part, tensors, settings)
                    elif part is not None:
                        tensors.append(part)
            apart = (*module.adapter_layer_names, *module.other_param_names)
            children = {name: child for name, child in children.items() if name not in apart}
        for child in children.values():
            if child is not None and child is not self:
                self._collect(child, tensors, settings)


class _Held:
    """A tensor as it is now: equal to itself as long as nothing writes into it."""

    def __init__(self, tensor: Tensor, version: int) -> None:
        self.tensor, self.version, self.place = tensor, version, (tensor.device, tensor.dtype)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _Held) and self.tensor is other.tensor
        return same and (self.version, self.place) == (other.version, other.place)  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]
