"""Help a model judge claims, in the ways of the experiment and in those that it left open.

A baseline is on the model within a `with` statement, which gives how a claim of a page is put to the model then.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.fever.data import FeverData, Page
from examples.fever.prompts import documents, facts, solved_claims
from memory_adapters.config import MemoryConfig
from memory_adapters.evaluation.comparison.baselines import Baseline, FineTuned, Lora, WrittenMemory
from memory_adapters.evaluation.comparison.finetuning import Recipe
from memory_adapters.inject import inject_memory, load_memory
from memory_adapters.items import Item
from memory_adapters.keys.router import route_memories
from memory_adapters.memit import MemitConfig
from memory_adapters.memory_slots import MemorySlotsConfig
from memory_adapters.residual_mlp import MemoryAdapterConfig

__all__ = ["EXPERIMENT", "FeverBaseline", "Reading", "Setup", "standard_baselines"]

DOC, TEMP = "Doc", "Temp"
WHOLE_EPOCHS = 10  # of what is trained through the whole model
EXPERIMENT = ("Pretrained", "Doc", "Temp", "DocTemp", "Doc, decay .01", "Temp, decay .01", "DocTemp, decay .01")


@dataclass(frozen=True)
class Setup:
    """Hold what a baseline works with.

    Attributes:
        model: A causal LM.
        tokenizer: Its tokenizer. Its chat template is not used: claims are judged as plain text.
        data: Pages and claims.
        seed: Of everything random.
        training_shots: Solved claims before each training claim in the few-shot form.
        folder: Where memories are saved that another baseline needs too.
        unrelated: Text on which residual memories are to be silent.
    """

    model: Any
    tokenizer: Any
    data: FeverData
    seed: int
    training_shots: int
    folder: Path
    unrelated: Sequence[str]

    @property
    def plain_tokenizer(self) -> Any:
        """The tokenizer without a chat template."""
        plain = copy.copy(self.tokenizer)
        plain.chat_template = None
        return plain

    def items(self, kinds: Sequence[str]) -> list[Item]:
        """Choose what is written: page texts (Doc), solved claims (Temp), or both."""
        found: list[Item] = []
        for kind in kinds:
            found += documents(self.data) if kind == DOC else solved_claims(self.data, self.training_shots, self.seed)
        return found


@dataclass(frozen=True)
class Reading:
    """Say how claims are put to the model while a baseline is on it.

    Attributes:
        num_parameters: How many numbers the baseline stores.
        context: Text before the prompt of a claim of this page.
        page: A context within which the model judges claims of this page; None where pages may be mixed.
        saved_seconds: Seconds that the memories took that were trained before, for another baseline.
    """

    num_parameters: int = 0
    context: Callable[[Page], str] = lambda page: ""
    page: Callable[[Page], AbstractContextManager[Any]] | None = None
    saved_seconds: float = 0.0


class FeverBaseline(ABC):
    """Help a model judge claims."""

    @abstractmethod
    def applied(self, setup: Setup) -> AbstractContextManager[Reading]:
        """Put the baseline on the model within this context; afterwards the model is what it was."""


@dataclass(frozen=True)
class Pretrained(FeverBaseline):
    """Leave the model as it is."""

    def applied(self, setup: Setup) -> AbstractContextManager[Reading]:
        return nullcontext(Reading())


@dataclass(frozen=True)
class PageInPrompt(FeverBaseline):
    """Put the page's text before the prompt."""

    def applied(self, setup: Setup) -> AbstractContextManager[Reading]:
        return nullcontext(Reading(context=lambda page: page.text))


@dataclass(frozen=True)
class Memories(FeverBaseline):
    """Train residual memories, each alone and saved in the folder of results; all are on the model together.

    Attributes:
        config: Of each; the seed is the setup's.
        kinds: What each memory is trained on: `[("Doc", "Temp")]` is one memory of both, `[("Doc",), ("Temp",)]` two.
        routed: Whether a router activates the memory that fits the input, and no other.
    """

    config: MemoryAdapterConfig
    kinds: tuple[tuple[str, ...], ...]
    routed: bool = False

    @contextmanager
    def applied(self, setup: Setup) -> Iterator[Reading]:
        config = replace(self.config, seed=setup.seed)
        folders = [self._folder(setup, config, kinds) for kinds in self.kinds]
        saved = [folder for folder in folders if (folder / "adapter_config.json").is_file()]
        for folder, kinds in zip(folders, self.kinds, strict=True):
            if folder not in saved:
                self._train(setup, config, kinds, folder)
        with ExitStack() as stack:
            found: list[Any] = []
            for folder in folders:
                found.append(load_memory(setup.model, folder, tokenizer=setup.plain_tokenizer))
                stack.callback(found[-1].remove)
            if self.routed:
                stack.enter_context(route_memories(setup.model))
            before = [memory for memory, folder in zip(found, folders, strict=True) if folder in saved]
            yield Reading(
                sum(memory.num_parameters() for memory in found),
                saved_seconds=sum(memory.config.reports()[-1].seconds for memory in before),
            )

    def _folder(self, setup: Setup, config: MemoryAdapterConfig, kinds: Sequence[str]) -> Path:
        decay = f"{config.weight_decay:g}".replace(".", "_")
        return setup.folder / "memories" / f"{''.join(kinds)}-{config.token_gate}-decay{decay}-seed{setup.seed}"

    def _train(self, setup: Setup, config: MemoryAdapterConfig, kinds: Sequence[str], folder: Path) -> None:
        memory: Any = inject_memory(setup.model, config, tokenizer=setup.plain_tokenizer)
        try:
            memory.write(setup.items(kinds), unrelated=setup.unrelated)
            memory.save_pretrained(folder)
        finally:
            memory.remove()


@dataclass(frozen=True)
class Trained(FeverBaseline):
    """Train a LoRA or all weights on the same items.

    Attributes:
        baseline: What is trained.
        kinds: On what.
    """

    baseline: Lora | FineTuned
    kinds: tuple[str, ...]

    @contextmanager
    def applied(self, setup: Setup) -> Iterator[Reading]:
        baseline: Baseline = replace(self.baseline, recipe=replace(self.baseline.recipe, seed=setup.seed))
        with baseline.applied(setup.model, setup.plain_tokenizer, setup.items(self.kinds)) as applied:
            yield Reading(applied.report.num_parameters)


@dataclass(frozen=True)
class Facts(FeverBaseline):
    """Write the supported training claims that are facts as a closed-form edit."""

    config: MemitConfig

    @contextmanager
    def applied(self, setup: Setup) -> Iterator[Reading]:
        baseline = WrittenMemory(replace(self.config, seed=setup.seed))
        with baseline.applied(setup.model, setup.plain_tokenizer, facts(setup.data)) as applied:
            yield Reading(applied.report.num_parameters)


@dataclass(frozen=True)
class PageInSlots(FeverBaseline):
    """Compress each page's text into slots, which the model reads before the prompt.

    Attributes:
        source: A config, or the folder or Hub id of a trained encoder.
        refine_steps: Gradient steps on each page's slots.
    """

    source: MemoryConfig | str
    refine_steps: int

    @contextmanager
    def applied(self, setup: Setup) -> Iterator[Reading]:
        if isinstance(self.source, str):
            memory: Any = load_memory(setup.model, self.source, tokenizer=setup.tokenizer)
        else:
            memory = inject_memory(setup.model, self.source, tokenizer=setup.tokenizer)
        try:
            pages = setup.data.pages
            made = memory.compress([page.text for page in pages], refine_steps=self.refine_steps)
            slots = dict(zip((page.title for page in pages), made, strict=True))

            @contextmanager
            def reading(page: Page) -> Iterator[None]:
                memory.use(slots[page.title])
                yield

            yield Reading(sum(one.vectors.numel() for one in made), page=reading)
        finally:
            memory.remove()


def standard_baselines(
    *, encoder: str | None = None, epochs: float = 25, bf16: bool = False
) -> dict[str, FeverBaseline]:
    """Return the experiment's baselines (`EXPERIMENT`), then those that it left open, by name.

    Args:
        encoder: Folder or Hub id of a slot encoder of this model; None for slots without one.
        epochs: Passes over the items of memories; a LoRA and all weights, which learn faster, make at most 10.
        bf16: Train all weights and the LoRA under bfloat16 autocast.
    """
    memory = MemoryAdapterConfig.fever_experiment(router_keys=True, num_train_epochs=epochs)
    both = {"Doc": ((DOC,),), "Temp": ((TEMP,),), "DocTemp": ((DOC, TEMP),)}
    two = ((DOC,), (TEMP,))
    training: Mapping[str, Any] = {"bf16": True} if bf16 else {}
    recipe = Recipe(
        1e-3, num_train_epochs=min(epochs, WHOLE_EPOCHS), target_loss=0.02, min_steps=0, training_args=training
    )
    lora = Lora(recipe=recipe)
    weights = FineTuned(replace(recipe, learning_rate=2e-5))
    slots = encoder or MemorySlotsConfig(read="all", num_slots=64, span_length=128, precision="bfloat16")
    return {
        "Pretrained": Pretrained(),
        **{name: Memories(memory, kinds) for name, kinds in both.items()},
        **{f"{name}, decay .01": Memories(replace(memory, weight_decay=0.01), kinds) for name, kinds in both.items()},
        "Doc and Temp, two memories": Memories(memory, two),
        "Doc and Temp, two memories, router": Memories(memory, two, routed=True),
        **{f"{kind}, LoRA": Trained(lora, (kind,)) for kind in (DOC, TEMP)},
        **{f"{kind}, all weights": Trained(weights, (kind,)) for kind in (DOC, TEMP)},
        "facts edited (MEMIT)": Facts(MemitConfig(precision="bfloat16")),
        "page in slots": PageInSlots(slots, refine_steps=20 if encoder else 60),
        "page in the prompt": PageInPrompt(),
    }
