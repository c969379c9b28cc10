"""Keep track of the memories on a model, on the model itself: copies and pickles of it have theirs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from memory_adapters.peft_layers.rollback import Restore

__all__ = ["ATTACHED", "Attached", "forget_memory", "saved_memories"]

ATTACHED = "_memory_adapters"


@dataclass(frozen=True)
class Attached:
    """Store the memories of a model by adapter name, and which base parameters were trainable before them."""

    memories: dict[str, Any] = field(default_factory=dict)
    trainable: list[str] = field(default_factory=list)


def forget_memory(model: PreTrainedModel, adapter_name: str) -> None:
    """Remove a memory's bookkeeping from the model; after the last one, base parameters are as trainable as before."""
    attached: Attached | None = getattr(model, ATTACHED, None)
    if attached is None:
        return
    left = {name: memory for name, memory in attached.memories.items() if name != adapter_name}
    if left:
        setattr(model, ATTACHED, Attached(left, attached.trainable))
        return
    parameters = dict(model.named_parameters())
    for name in attached.trainable:
        if name in parameters:
            parameters[name].requires_grad_(True)
    delattr(model, ATTACHED)


def saved_memories(model: PreTrainedModel) -> Restore:
    """Return a function that forgets the memories that were injected since; their adapters are removed apart."""
    before = getattr(model, ATTACHED, None)

    def restore() -> None:
        vars(model).pop(ATTACHED, None)
        if before is not None:
            setattr(model, ATTACHED, before)

    return restore
