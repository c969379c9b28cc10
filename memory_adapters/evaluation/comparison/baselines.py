"""Give a model knowledge in several ways behind one interface, so that experiments treat them alike.

The memory methods, and what they are compared with: a LoRA adapter, all weights trained on the same rows, and the
unchanged model. Each is on the model within a `with` statement, and leaves the model as it was.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.seeding import seeded
from memory_adapters.config import MemoryConfig
from memory_adapters.evaluation.comparison.finetuning import Recipe, train
from memory_adapters.files.hub import find_files
from memory_adapters.files.names import CARD_FILE, CONFIG_FILES, PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.tensors import write_tensors
from memory_adapters.inject import inject_memory, load_memory
from memory_adapters.items import Fact, Item
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.attached import forget_memory
from memory_adapters.peft_layers.layers import adapter_layers, adapter_tensors, remove_adapter, saved_activation
from memory_adapters.registry import saved_file_names
from memory_adapters.report import WriteReport

__all__ = ["AppliedBaseline", "Baseline", "FineTuned", "Lora", "Together", "Unchanged", "WrittenMemory"]

ADAPTER = "baseline"


@dataclass(frozen=True)
class AppliedBaseline:
    """Store what can be done with a baseline while it is on a model.

    Attributes:
        report: What its writing reported: `seconds` is wall time, `num_parameters` how many numbers it stores.
        save: Saves what has to be kept of it, in a folder.
        disabled: Gives a context within which the model is without it; None if it cannot be switched off.
        forget: Takes one of the facts out again, or raises `NotImplementedError`; None if all others have to be
            written again.
    """

    report: WriteReport
    save: Callable[[Path], None]
    disabled: Callable[[], AbstractContextManager[Any]] | None = None
    forget: Callable[[Fact], Any] | None = None


class Baseline(ABC):
    """Give a model knowledge, in one of the ways that a comparison compares."""

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that this cannot work on, before anything is measured. Raises as `inject_memory`."""
        find_decoder(model)

    def accepts(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[type[Item], ...]:
        """Return the kinds of items that it takes."""
        return Memory.accepts

    def settings(self) -> dict[str, Any]:
        """Return what decides the outcome beside the model and the items, to tell one experiment from another."""
        return {"kind": type(self).__name__, **vars(self)}

    @abstractmethod
    def applied(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> AbstractContextManager[AppliedBaseline]:
        """Give the model the knowledge within this context; afterwards, also on failure, it is what it was before."""


@dataclass(frozen=True)
class Unchanged(Baseline):
    """Leave the model as it is."""

    @contextmanager
    def applied(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> Iterator[AppliedBaseline]:
        yield AppliedBaseline(_report("nothing", items, 0, 0.0), lambda _folder: None)


@dataclass(frozen=True)
class WrittenMemory(Baseline):
    """Write a memory of any method.

    Attributes:
        source: A config, for a fresh memory; or the folder or Hub id of a saved one to write more into, such as a
            trained slot encoder.
        write_options: Keyword arguments of its `write`.
    """

    source: MemoryConfig | str
    write_options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._attach(model, tokenizer).remove()

    def accepts(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[type[Item], ...]:
        """Return the kinds of items that the memory takes."""
        memory = self._attach(model, tokenizer)
        memory.remove()
        return memory.accepts

    def settings(self) -> dict[str, Any]:
        """Return the settings, as of any baseline; files count by what they hold, not by where they are."""
        options = {name: _digest(value) for name, value in self.write_options.items()}
        if not isinstance(self.source, str):
            return {**super().settings(), "write_options": options}
        folder = find_files(self.source, revision=None, token=None)
        names = [
            name for name in (*CONFIG_FILES, *saved_file_names()) if name != CARD_FILE and (folder / name).is_file()
        ]
        return {**super().settings(), "write_options": options, "source": {n: _digest(folder / n) for n in names}}

    def _attach(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter_name: str = ADAPTER
    ) -> Memory[Any]:
        if isinstance(self.source, str):
            return load_memory(model, self.source, tokenizer=tokenizer, adapter_name=adapter_name)
        return inject_memory(model, self.source, tokenizer=tokenizer, adapter_name=adapter_name)

    @contextmanager
    def applied(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        items: Sequence[Item],
        adapter_name: str = ADAPTER,
    ) -> Iterator[AppliedBaseline]:
        memory = self._attach(model, tokenizer, adapter_name)
        try:
            # What a report measures is measured by the comparison, and is no cost of writing.
            report = memory.write(list(items), **{"measure": False, **self.write_options})
            yield AppliedBaseline(report, memory.save_pretrained, memory.disabled, memory.forget)
        finally:
            memory.remove()


def _digest(value: Any) -> Any:
    """Return the SHA-256 of a file that is named; any other value as it is."""
    if isinstance(value, str | Path) and Path(value).is_file():
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return value


@dataclass(frozen=True)
class Together(Baseline):
    """Write the same items to several memories, one after the other, that then act together.

    Attributes:
        memories: The memories, in the order of writing.
    """

    memories: Sequence[WrittenMemory]

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        for memory in self.memories:
            memory.check(model, tokenizer)

    def accepts(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[type[Item], ...]:
        """Return the kinds of items that all of them take."""
        first, *others = (memory.accepts(model, tokenizer) for memory in self.memories)
        return tuple(kind for kind in first if all(kind in own for own in others))

    def settings(self) -> dict[str, Any]:
        """Return the settings of each."""
        return {"kind": type(self).__name__, "memories": [memory.settings() for memory in self.memories]}

    @contextmanager
    def applied(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> Iterator[AppliedBaseline]:
        with ExitStack() as stack:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*are written in the active memory")  # as is wanted here
                every = [
                    stack.enter_context(memory.applied(model, tokenizer, items, f"{ADAPTER}_{i}"))
                    for i, memory in enumerate(self.memories)
                ]
            reports = [one.report for one in every]
            report = _report(
                " + ".join(report.method for report in reports),
                items,
                sum(report.num_parameters for report in reports),
                sum(report.seconds for report in reports),
            )

            def save(folder: Path) -> None:
                for i, one in enumerate(every):
                    one.save(folder / str(i))

            @contextmanager
            def disabled() -> Iterator[None]:
                with ExitStack() as off:
                    for one in every:
                        if one.disabled is not None:
                            off.enter_context(one.disabled())
                    yield

            def forget(fact: Fact) -> None:
                for one in every:
                    if one.forget is not None:
                        one.forget(fact)

            yield AppliedBaseline(report, save, disabled, forget)


@dataclass(frozen=True)
class Lora(Baseline):
    """Train a LoRA adapter, on the matrices that PEFT chooses for the architecture.

    Attributes:
        rank: Its rank; `lora_alpha` is twice that.
        recipe: How it is trained.
    """

    rank: int = 8
    recipe: Recipe = Recipe(learning_rate=1e-3)  # noqa: RUF009 (frozen)

    @contextmanager
    def applied(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> Iterator[AppliedBaseline]:
        start = time.perf_counter()
        with _lora(model, self.rank) as parameters:
            losses = train(model, tokenizer, items, self.recipe, parameters)
            count = sum(parameter.numel() for parameter in parameters)
            report = _report("LoRA", items, count, time.perf_counter() - start, losses)
            yield AppliedBaseline(report, lambda folder: _save_lora(model, folder), lambda: _without_lora(model))


@dataclass(frozen=True)
class FineTuned(Baseline):
    """Train all weights, in float32; they are used in the model's own precision, and put back afterwards.

    Attributes:
        recipe: How they are trained.
    """

    recipe: Recipe = Recipe(learning_rate=2e-5)  # noqa: RUF009 (frozen)

    @contextmanager
    def applied(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> Iterator[AppliedBaseline]:
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
            report = _report("all weights", items, count, time.perf_counter() - start, losses)
            yield AppliedBaseline(report, model.save_pretrained)
        finally:
            for parameter, tensor in before.items():
                parameter.data = tensor
            for buffer, tensor in buffers:
                buffer.copy_(tensor)


def _report(
    method: str, items: Sequence[Item], num_parameters: int, seconds: float, losses: Sequence[float] = ()
) -> WriteReport:
    kinds = dict(Counter(type(item).__name__ for item in items))
    return WriteReport(method, kinds, losses=list(losses), num_parameters=num_parameters, seconds=seconds)


@contextmanager
def _lora(model: PreTrainedModel, rank: int) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters of a fresh LoRA adapter, and remove it again; other adapters stay as active as they were."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    active = [(layer, list(layer.active_adapters)) for layer in adapter_layers(model)]
    with saved_activation([layer for layer, _ in active]):
        with seeded(0), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        try:
            for layer, names in active:  # PEFT has switched them off in the layers that they share with the new one
                layer._active_adapter = [*names, *([ADAPTER] if ADAPTER in layer._get_available_adapters() else [])]
            yield [parameter for name, parameter in model.named_parameters() if f".{ADAPTER}." in name]
        finally:
            remove_adapter(model, ADAPTER)
            forget_memory(model, ADAPTER)
            for parameter in trainable:
                parameter.requires_grad_(True)


@contextmanager
def _without_lora(model: PreTrainedModel) -> Iterator[None]:
    layers = adapter_layers(model, ADAPTER)
    with saved_activation(layers):
        for layer in layers:
            layer._active_adapter = [name for name in layer.active_adapters if name != ADAPTER]
        yield


def _save_lora(model: PreTrainedModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PEFT_KEY_PREFIX + name: tensor for name, tensor in adapter_tensors(model, ADAPTER).items()}
    write_tensors(folder / WEIGHTS_FILE, tensors)
    model.peft_config[ADAPTER].save_pretrained(str(folder))
