"""Ways to give a model knowledge, behind one interface, so that experiments treat them alike.

The memory methods, and what they are compared with: a LoRA adapter or all weights trained on the same rows, the text
in the prompt, and nothing. Each is on the model within a `with` statement, and leaves the model as it was.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.seeding import seeded
from memory_adapters.config import MemoryConfig
from memory_adapters.evaluation.comparison.finetuning import Recipe, train
from memory_adapters.files.hub import find_files
from memory_adapters.files.names import CARD_FILE, CONFIG_FILES, PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.tensors import write_tensors
from memory_adapters.inject import inject_memory, load_memory
from memory_adapters.items import Fact, Item
from memory_adapters.memory import forget_memory
from memory_adapters.memory_slots import MemorySlotsConfig
from memory_adapters.memory_slots.prompts import as_text
from memory_adapters.memory_slots.write import embedded_text
from memory_adapters.peft_layers.layers import adapter_layers, adapter_tensors, remove_adapter
from memory_adapters.registry import saved_file_names
from memory_adapters.report import WriteReport

__all__ = ["Baseline", "FineTuned", "Held", "InPrompt", "Lora", "Memorised", "Unchanged"]

ADAPTER = "baseline"


@dataclass(frozen=True)
class Held:
    """What a baseline put on a model, while it is there.

    Attributes:
        report: What its writing reported: `seconds` is wall time, `num_parameters` the numbers that it stores.
        save: Writes what has to be kept of it into a folder.
        disabled: A context within which the model is without it; None where there is no such switch.
        forget: Takes one of the facts out again; None where that needs a new write of all others.
    """

    report: WriteReport
    save: Callable[[Path], None]
    disabled: Callable[[], AbstractContextManager[Any]] | None = None
    forget: Callable[[Fact], Any] | None = None


class Baseline(ABC):
    """A way to give a model knowledge."""

    def check(self, model: Any, tokenizer: Any) -> None:
        """Refuse a model that this cannot work on, before anything is measured. Raises as `inject_memory`."""
        find_decoder(model)

    def settings(self) -> dict[str, Any]:
        """What decides the outcome beside the model and the items, to tell one experiment from another."""
        return {"kind": type(self).__name__, **vars(self)}

    @abstractmethod
    def holding(self, model: Any, tokenizer: Any, items: Sequence[Item]) -> AbstractContextManager[Held]:
        """Within this context the model has the knowledge; afterwards, also on failure, it is what it was before."""


@dataclass(frozen=True)
class Unchanged(Baseline):
    """The model as it is."""

    @contextmanager
    def holding(self, model: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[Held]:
        yield Held(_report("nothing", items, 0, 0.0), lambda _folder: None)


@dataclass(frozen=True)
class Memorised(Baseline):
    """A memory of one of the methods.

    Attributes:
        source: A config, for a fresh memory; or the folder or Hub id of a saved one to write more into, such as a
            trained slot encoder.
        write_settings: Keyword arguments of its `write`.
    """

    source: MemoryConfig | str
    write_settings: Mapping[str, Any] = field(default_factory=dict)

    def check(self, model: Any, tokenizer: Any) -> None:
        self._attach(model, tokenizer).remove()

    def settings(self) -> dict[str, Any]:
        """As of any baseline; a saved memory counts by what its files hold, not by where they are."""
        if not isinstance(self.source, str):
            return super().settings()
        folder = find_files(self.source, revision=None, token=None)
        names = [
            name for name in (*CONFIG_FILES, *saved_file_names()) if name != CARD_FILE and (folder / name).is_file()
        ]
        held = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        return {**super().settings(), "source": held}

    def _attach(self, model: Any, tokenizer: Any) -> Any:
        if isinstance(self.source, str):
            return load_memory(model, self.source, tokenizer=tokenizer, adapter_name=ADAPTER)
        return inject_memory(model, self.source, tokenizer=tokenizer, adapter_name=ADAPTER)

    @contextmanager
    def holding(self, model: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[Held]:
        memory = self._attach(model, tokenizer)
        try:
            report = memory.write(list(items), **self.write_settings)
            yield Held(report, memory.save_pretrained, memory.disabled, getattr(memory, "forget", None))
        finally:
            memory.remove()


@dataclass(frozen=True)
class Lora(Baseline):
    """A LoRA adapter on the matrices that PEFT chooses, trained on the rows that a residual memory is trained on.

    Attributes:
        num_parameters: About how many numbers it may store: the rank is the one that comes nearest. None for `rank`.
        rank: Its rank, if `num_parameters` is None; `lora_alpha` is twice that.
        recipe: How it is trained.
    """

    num_parameters: int | None = None
    rank: int = 8
    recipe: Recipe = Recipe(learning_rate=1e-3)  # noqa: RUF009 (frozen)

    @contextmanager
    def holding(self, model: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[Held]:
        start = time.perf_counter()
        rank = self.rank
        if self.num_parameters is not None:
            with _lora(model, 1) as parameters:
                rank = max(1, round(self.num_parameters / sum(p.numel() for p in parameters)))
        with _lora(model, rank) as parameters:
            losses = train(model, tokenizer, items, self.recipe, parameters)
            count = sum(parameter.numel() for parameter in parameters)
            report = _report("LoRA", items, count, time.perf_counter() - start, losses)
            yield Held(report, lambda folder: _save_lora(model, folder), lambda: _without_lora(model))


@dataclass(frozen=True)
class FineTuned(Baseline):
    """All weights, trained on the rows that a residual memory is trained on; the weights are put back afterwards.

    They are trained in float32 and used in the model's own precision.

    Attributes:
        recipe: How they are trained.
    """

    recipe: Recipe = Recipe(learning_rate=2e-5)  # noqa: RUF009 (frozen)

    @contextmanager
    def holding(self, model: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[Held]:
        start = time.perf_counter()
        before = {parameter: parameter.data for parameter in model.parameters()}
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # not cast: rotary frequencies are float32
        try:
            for parameter, tensor in before.items():
                parameter.data = tensor.to(torch.float32, copy=True)
            losses = train(model, tokenizer, items, self.recipe, list(before))
            for parameter, tensor in before.items():
                parameter.data = parameter.data.to(tensor.dtype)
            count = sum(tensor.numel() for tensor in before.values())
            yield Held(_report("all weights", items, count, time.perf_counter() - start, losses), model.save_pretrained)
        finally:
            for parameter, tensor in before.items():
                parameter.data = tensor
            for buffer, tensor in buffers:
                buffer.copy_(tensor)


@dataclass(frozen=True)
class InPrompt(Baseline):
    """The text itself before every prompt: its token embeddings, read with their keys and values kept.

    Facts are written out as sentences, a line each.
    """

    @contextmanager
    def holding(self, model: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[Held]:
        start = time.perf_counter()
        config = MemorySlotsConfig(num_slots=1, span_length=1, lora_rank=1)
        memory: Any = inject_memory(model, config, tokenizer=tokenizer)
        try:
            listed = list(items)

            def read() -> None:
                memory.use(embedded_text(memory.encoder, memory.tokenizer, as_text(listed) + "\n"))

            def forget(fact: Fact) -> None:
                listed.remove(fact)
                read()

            def save(folder: Path) -> None:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "prompt.txt").write_text(as_text(listed), encoding="utf-8")

            read()
            count = memory.slots[0].num_slots
            report = _report("in the prompt", items, count, time.perf_counter() - start)
            yield Held(report, save, memory.disabled, forget)
        finally:
            memory.remove()


def _report(
    method: str, items: Sequence[Item], num_parameters: int, seconds: float, losses: Sequence[float] = ()
) -> WriteReport:
    kinds = dict(Counter(type(item).__name__ for item in items))
    return WriteReport(method, kinds, losses=list(losses), num_parameters=num_parameters, seconds=seconds)


@contextmanager
def _lora(model: Any, rank: int) -> Iterator[list[nn.Parameter]]:
    """The parameters of a fresh LoRA adapter, which is taken out again; other adapters are as active as they were."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    active = [(layer, list(layer.active_adapters)) for layer in adapter_layers(model)]
    with seeded(0), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    try:
        for layer, names in active:
            layer._active_adapter = [*names, *([ADAPTER] if ADAPTER in layer._get_available_adapters() else [])]
        yield [parameter for name, parameter in model.named_parameters() if f".{ADAPTER}." in name]
    finally:
        remove_adapter(model, ADAPTER)
        forget_memory(model, ADAPTER)
        for layer, names in active:
            layer._active_adapter = names
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _without_lora(model: Any) -> Iterator[None]:
    layers = adapter_layers(model, ADAPTER)
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name for name in layer.active_adapters if name != ADAPTER]
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


def _save_lora(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PEFT_KEY_PREFIX + name: tensor for name, tensor in adapter_tensors(model, ADAPTER).items()}
    write_tensors(folder / WEIGHTS_FILE, tensors)
    model.peft_config[ADAPTER].save_pretrained(str(folder))
