"""The interface every memory method implements."""

from __future__ import annotations

import copy
import html
import inspect
import json
import os
import time
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast, overload

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.answering import answered_in_chat, asked_row, chat_answers
from memory_adapters.base_model.decoder import (
    Decoder,
    check_not_sharded,
    context_length,
    execution_device,
    find_decoder,
)
from memory_adapters.base_model.exclusive import ExclusiveUse, exclusive_use
from memory_adapters.base_model.fingerprint import Fingerprint, base_fingerprint
from memory_adapters.base_model.item_rows import ScoredRow, plain_rows
from memory_adapters.base_model.modes import evaluating, own_settings
from memory_adapters.base_model.scoring import Scores, scored
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.base_model.trial import trial
from memory_adapters.base_model.unrelated_questions import LEAST_SAME, share_same, unrelated_answers
from memory_adapters.card_examples import card_examples
from memory_adapters.config import MemoryConfig
from memory_adapters.embedded_model import EMBEDDED_ID, is_embedded
from memory_adapters.explanation import Explanation
from memory_adapters.files.atomic import atomic_directory, replacing
from memory_adapters.files.exports import Exporter, export_files
from memory_adapters.files.hub import OnHub
from memory_adapters.files.model_card import CardExample, hub_id, model_card
from memory_adapters.files.names import CARD_FILE, CONFIG_FILE, CONFIG_FILES, PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.strict_json import read_json
from memory_adapters.files.tensors import read_tensors, write_tensors
from memory_adapters.items import (
    Document,
    Fact,
    Item,
    Items,
    QuestionAnswer,
    as_items,
    asked_by,
    remarks,
    without_repetitions,
)
from memory_adapters.peft_layers.attached import ATTACHED, Attached, forget_memory
from memory_adapters.peft_layers.layers import (
    MemoryLayer,
    adapter_layers,
    own_tensors,
    remove_adapter,
    saved_activation,
    set_own_tensors,
)
from memory_adapters.peft_layers.rollback import Restore, rollback_on_error, saved_attributes
from memory_adapters.peft_layers.virtual_tokens import virtual_tokens_disabled
from memory_adapters.registry import saved_file_names
from memory_adapters.report import ItemResult, WriteReport, html_table
from memory_adapters.validation import check_number, check_path, shown

__all__ = ["Memory", "Outcome"]

MOST_EARLIER = 256  # items of earlier writes that are scored again
SHOWN_ITEMS = 20  # in a notebook
MOST_CHATS = 20  # items that are asked in the chat template: an answer takes many passes
MOST_CHAT_TOKENS = 1024

ConfigT = TypeVar("ConfigT", bound=MemoryConfig)


@dataclass(frozen=True)
class Outcome:
    """Report what a method's `_write` did; see the fields of `WriteReport`."""

    losses: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reconstruction: tuple[float, float] | None = None  # before and after


class Memory(OnHub, Generic[ConfigT]):
    """Write knowledge into one model, and switch it off, remove it, save it and load it.

    `inject_memory` and `load_memory` make it; it is not made directly.

    Attributes:
        model: The Hugging Face model that it is on (inside a PeftModel, the base).
        adapter_name: Its name on the model.
        tokenizer: The model's tokenizer, needed to write.
        accepts: The kinds of items that it takes.
    """

    accepts: ClassVar[tuple[type[Item], ...]] = (Fact, Document, QuestionAnswer)
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
    optional_files: ClassVar[tuple[str, ...]] = ()
    files_beside: ClassVar[tuple[str, ...]] = ()  # read where they are, but not the memory's: a save leaves them
    export_note: ClassVar[str] = "Keep it as an adapter (`save_pretrained`)."  # why it has no other format, what to do

    def __init__(
        self,
        model: PreTrainedModel,
        adapter_name: str,
        config: ConfigT,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self.tokenizer = tokenizer
        self._config = config
        self._adapter_config = cast(PeftConfig, model.peft_config[adapter_name])

    # What a method gives. Its items, rows and saved contents are of kinds of its own, so `Any` here.

    @abstractmethod
    def _write(self, items: Sequence[Any], rows: Sequence[Any], *, progress: bool) -> Outcome:
        """Learn `items`, whose rows of tokens are `rows`; its other keyword arguments are the options of `write`."""

    def _check_items(self, items: Sequence[Item], **options: Any) -> tuple[Sequence[Item], list[str]]:
        """Return the items that are written, and notes; raise an error for what cannot be written."""
        return items, []

    def _rows(self, items: Sequence[Any]) -> Sequence[ScoredRow]:
        """Return the rows of tokens that `_scores` scores."""
        return plain_rows(items, self._require_tokenizer(), context_length(self.model))

    def _attach(self, decoder: Decoder) -> None:
        """Put on the model what PEFT does not inject; called once, by `inject_memory`."""

    def _try_model(self, decoder: Decoder) -> None:
        """Raise a `ValueError` unless a few tokens pass through the model as the method needs it."""
        ids = torch.ones(1, 2, dtype=torch.long, device=execution_device(decoder.embeddings))
        with trial(self.model, "does not run with the memory in place", "It cannot have a memory of this method."):
            self.model(input_ids=ids, use_cache=False)

    def _saved_state(self) -> list[Restore]:
        """Return functions that undo what `_write` changes of the memory, and of nothing else."""
        return [saved_attributes(self, self._config, self._adapter_config)]

    def _exporters(self) -> Mapping[str, Exporter]:
        """Return the formats that the memory can be exported in."""
        return {}

    # Writing.

    def write(self, items: Items, *, progress: bool = True, measure: bool = True, **options: Any) -> WriteReport:
        """Learn items; what was written before stays.

        The memory takes part while it is written, whether or not it is active. If the write fails or is interrupted
        (Ctrl-C), the model and the memory are what they were before.

        Args:
            items: One item or many: `Fact`, `Document` (or a plain string) and `QuestionAnswer`; see `accepts`.
            progress: Whether to show progress bars.
            measure: Whether to measure, before and after, what is recalled and what else changes. It takes seconds,
                however few items there are; without it the report has neither.
            options: The method's own options; `write_options` names them, and the class says what they do.

        Returns:
            What was learned, what it did to other text, and at what cost.

        Raises:
            TypeError: If an item is of a kind, or an option of a name, that this memory does not take.
            ValueError: If there is no tokenizer or no item, an item does not fit in the model's context, or an option
                cannot be used.
            RuntimeError: If another thread uses the model, or all of its adapters are disabled.
        """
        start = time.perf_counter()
        if unknown := sorted(set(options) - set(self.write_options())):
            known = ", ".join(f"`{name}`" for name in self.write_options()) or "none"
            raise TypeError(f"`{unknown[0]}` is no option of `{type(self).__name__}.write`; its options are {known}.")
        listed = as_items(items, self.accepts)
        with exclusive_use(self.model), own_settings():
            self._check_writable()
            listed, repeated = without_repetitions(listed)
            written, notes = self._check_items(listed, **options)
            notes = [*remarks(written), *repeated, *notes]
            earlier = evenly(self._kept(written), MOST_EARLIER) if measure else []
            rows = self._rows([*written, *earlier])
            self._warn_of_repeated(written)
            with self._taking_part(), rollback_on_error(*self._saved_state()):
                measured = _Measured(self, written, earlier, rows, progress) if measure else None
                own = [row for row in rows if row.item < len(written)]
                outcome = self._write(written, own, progress=progress, **options) if written else Outcome()
                found = {} if measured is None else measured.after()
                self._set_items(written)
                rebuilt_before, rebuilt = outcome.reconstruction or (None, None)
                report = WriteReport(
                    method=self._config.method_name,
                    num_items=dict(Counter(type(item).__name__ for item in written)),
                    reconstruction=rebuilt,
                    reconstruction_before=rebuilt_before,
                    losses=outcome.losses,
                    num_parameters=self.num_parameters(),
                    seconds=time.perf_counter() - start,
                    notes=[*notes, *outcome.notes, *found.pop("notes", [])],
                    **found,
                )
                self._config.record(report)
        return report

    def _unrelated_answers(self, written: Sequence[Item]) -> list[str]:
        """Return the model's chat answers about well-known things that the items do not name."""
        tokenizer = self._require_tokenizer()
        longest = context_length(self.model) - self._num_virtual_tokens()
        return unrelated_answers(self.model, tokenizer, written, longest) if tokenizer.chat_template else []

    def _kept(self, written: Sequence[Item]) -> list[Item]:
        """Return the items of earlier writes that these do not replace."""
        asked = set(map(asked_by, written))
        return [item for item in self.items if asked_by(item) not in asked]

    def _warn_of_repeated(self, written: Sequence[Item]) -> None:
        """Warn of items that another active memory on the model has too, as after a notebook's cell was run twice."""
        attached: Attached = getattr(self.model, ATTACHED, None) or Attached()
        for name, other in attached.memories.items():
            if (
                other is not self
                and other.attached
                and other.active
                and (held := set(other.config.written_items()) & set(written))
            ):
                warnings.warn(
                    f"{len(held)} of the {len(written)} items are written in the active memory {name!r} too, such as "
                    f"{next(item for item in written if item in held)!r}: both take part, and when one is removed the "
                    f"other still answers. `memories(model)[{name!r}].remove()` removes the other.",
                    stacklevel=3,
                )

    def _results(self, items: Sequence[Item], num_written: int, before: Scores, after: Scores) -> list[ItemResult]:
        """Return what became of each fact and question; some of those written now are also asked in chat."""
        asked = {i: item for i, item in enumerate(items) if not isinstance(item, Document)}
        tried = evenly([i for i in asked if i < num_written], MOST_CHATS)
        chats = dict(zip(tried, self._answered_in_chat([asked[i] for i in tried]), strict=True))
        return [
            ItemResult(
                item.prompt,
                item.target,
                after.recalled[i][0],
                before.recalled[i][0],
                chats.get(i),
                earlier=i >= num_written,
            )
            for i, item in asked.items()
        ]

    def _answered_in_chat(self, items: Sequence[Fact | QuestionAnswer]) -> list[bool | None]:
        """Return whether the model's answer to each prompt in the chat template names its target."""
        longest = min(context_length(self.model) - self._num_virtual_tokens(), MOST_CHAT_TOKENS)
        asked = [(item.prompt, item.target) for item in items]
        return answered_in_chat(self.model, self._require_tokenizer(), asked, longest)

    @classmethod
    def write_options(cls) -> list[str]:
        """Return the names of the method's own options of `write`."""
        parameters = inspect.signature(cls._write).parameters
        return [name for name in parameters if name not in ("self", "items", "rows", "progress")]

    def _scores(self, rows: Sequence[ScoredRow]) -> Scores:
        """Score rows and held-out sentences on the model as it is."""
        return scored(self.model, self._require_tokenizer(), rows, self._config.layers_path)

    def _set_items(self, written: Sequence[Item]) -> None:
        """Add what was written to the config's items, in the place of what asked the same."""
        self._config.set_items([*self._kept(written), *written])

    def forget(self, items: Items) -> None:
        """Take items out again: the memory is what it would be had they never been written.

        Args:
            items: One item or many, as they were written; see `items`.

        Raises:
            NotImplementedError: If the method cannot take out single items; says what to do instead.
            ValueError: If an item is not written; nothing is forgotten then.
        """
        raise NotImplementedError(
            f"{self._config.method_name} cannot forget single items: `remove` the memory, inject a new one, and write "
            "what is to stay (`items` lists what is written)."
        )

    def _listed_written(self, items: Items) -> list[Item]:
        """Return items as a list; raise a `ValueError` that names the first that is not written."""
        named, known = as_items(items, self.accepts), set(self.items)
        if missing := [item for item in named if item not in known]:
            raise ValueError(f"`items` holds {missing[0]!r}, which is not written; see `items`.")
        return named

    @property
    def items(self) -> list[Item]:
        """What is written, in the order of the writes."""
        return self.config.written_items()

    # Asking.

    @overload
    def ask(self, questions: str, *, max_new_tokens: int = ...) -> str: ...

    @overload
    def ask(self, questions: list[str] | tuple[str, ...], *, max_new_tokens: int = ...) -> list[str]: ...

    def ask(self, questions: str | list[str] | tuple[str, ...], *, max_new_tokens: int = 128) -> str | list[str]:
        """Ask the model as it stands, and return its greedy answer.

        A question is a user's message in the chat template; without a template it is plain text, and the answer's first
        line is returned. For sampling, streaming or longer chats use `model.generate`.

        Args:
            questions: One question or several.
            max_new_tokens: Most tokens of an answer.

        Raises:
            TypeError: If a question is no string.
            ValueError: If the memory has no tokenizer, or `max_new_tokens` is below 1.
        """
        listed = list(questions) if isinstance(questions, (list, tuple)) else [questions]
        if wrong := [one for one in listed if not isinstance(one, str)]:
            raise TypeError(f"`questions` must be a string or a list of strings, got {shown(wrong[0])}.")
        check_number("max_new_tokens", max_new_tokens, low=1, integer=True)
        self._register_again()
        tokenizer = self._require_tokenizer()
        answers = [answer.strip() for answer in chat_answers(self.model, tokenizer, listed, num_tokens=max_new_tokens)]
        return answers[0] if isinstance(questions, str) else answers

    def explain(self, prompt: str, *, chat: bool = True) -> Explanation:
        """Show at which tokens of a prompt the memory acts when it is active, and what of it.

        Args:
            prompt: A question as `ask` takes it, or any text.
            chat: Whether it is asked as `ask` asks it; if not it is read as it is.

        Raises:
            TypeError: If the prompt is no string.
            ValueError: If the memory has no tokenizer, or the prompt is empty.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"`prompt` must be a string, got {shown(prompt)}.")
        if not prompt.strip():
            raise ValueError(f"`prompt` is {prompt!r}: give some text.")
        self._register_again()
        tokenizer = self._require_tokenizer()
        ids = asked_row(tokenizer, prompt)[0] if chat else tokenize(tokenizer, prompt)
        with exclusive_use(self.model), self._enabled(), evaluating(self.model), torch.no_grad():
            acts = self._acts(ids)
        tokens = [str(tokenizer.decode([token])) for token in ids]
        return Explanation(tokens, acts or {}, everywhere=acts is None)

    def _acts(self, ids: Sequence[int]) -> dict[str, list[float]] | None:
        """Return what acts in a row of tokens, and how far at each, in [0, 1]; None if the memory has no gate."""
        return None

    # Taking part.

    @property
    def config(self) -> ConfigT:
        """The memory's config, with layers resolved."""
        self._check_attached()
        return self._config

    @property
    def attached(self) -> bool:
        """Whether the memory is still on its model.

        PEFT's `merge_and_unload` and `unload` of another adapter drop the configs of all adapters; a memory whose
        modules they left in place is still on the model, and the next call of one of its methods registers it again.
        """
        known = getattr(self.model, "peft_config", {}).get(self.adapter_name)
        return known is self._adapter_config or (known is None and self._in_place())

    def _in_place(self) -> bool:
        """Return whether the memory's modules are on the model, whatever PEFT's bookkeeping says."""
        return bool(self.tuner_layers())

    def _check_attached(self) -> None:
        if not self.attached:
            raise RuntimeError(f"The memory {self.adapter_name!r} was removed from its model; inject or load it again.")

    def _register_again(self) -> None:
        """Raise a `RuntimeError` if the memory is gone; register it again if only its registration is."""
        self._check_attached()
        configs: dict[str, Any] = getattr(self.model, "peft_config", {})
        if self.adapter_name not in configs:
            self.model.peft_config = {**configs, self.adapter_name: cast(Any, self._adapter_config)}
            self._rebase(base_fingerprint(self.model, self._config.layers_path))

    def _rebase(self, fingerprint: Fingerprint) -> None:
        """Take the model as it is now for the memory's base, after something else changed its weights."""
        self._config.base_fingerprint = {**(self._config.base_fingerprint or {}), **fingerprint}

    def _check_writable(self) -> None:
        self._register_again()
        check_not_sharded(self.model)
        self._require_tokenizer()
        own = self._config.base_fingerprint or {}
        for name, value in base_fingerprint(self.model, self._config.layers_path).items():
            if value is not None and own.get(name) not in (None, value):
                raise ValueError(
                    f"The base model has changed since {self.adapter_name!r} was injected: its `{name}` was "
                    f"{own[name]}, and is {value} now. Undo the change (such as with `unmerge_adapter()`), or inject "
                    "a new memory."
                )

    def _require_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer; raise a `ValueError` if the memory has none."""
        if self.tokenizer is None:
            raise ValueError("This needs the model's tokenizer: inject or load with `tokenizer=...`.")
        return self.tokenizer

    def tuner_layers(self) -> Sequence[BaseTunerLayer]:
        """Return the PEFT layers that hold this memory, lowest block first."""
        return adapter_layers(self.model, self.adapter_name)

    @property
    def active(self) -> bool:
        """Whether the memory takes part in forward passes. Assign to switch it; others are not touched."""
        self._check_attached()
        layers = self.tuner_layers()
        return bool(layers) and all(self.adapter_name in x.active_adapters and not x.disable_adapters for x in layers)

    @active.setter
    def active(self, value: bool) -> None:
        self._register_again()
        with exclusive_use(self.model):
            layers = self.tuner_layers()
            others = [[name for name in layer.active_adapters if name != self.adapter_name] for layer in layers]
            wanted = [self._in_order(names) if value else names for names in others]
            for layer, names in zip(layers, wanted, strict=True):
                layer._active_adapter = names

    def _in_order(self, others: list[str]) -> list[str]:
        """Return `others` with this memory at its place: sums are rounded alike after it was off and on again."""
        order = list(self.model.peft_config)
        later = order[order.index(self.adapter_name) + 1 :]
        place = next((i for i, name in enumerate(others) if name in later), len(others))
        return [*others[:place], self.adapter_name, *others[place:]]

    def disabled(self) -> ExclusiveUse:
        """Run the model, within this context and in its thread or task, as it is without this memory, bit for bit."""
        self._check_attached()
        return exclusive_use(self.model, partial(self._switch, False))

    def _enabled(self) -> ExclusiveUse:
        return exclusive_use(self.model, partial(self._switch, True))

    def _switch(self, value: bool, undo: ExitStack) -> None:
        undo.enter_context(saved_activation(self.tuner_layers()))
        self.active = value

    @contextmanager
    def _taking_part(self) -> Iterator[None]:
        """Let the memory take part, unrouted, and no other put virtual tokens before the prompt."""
        layers = self.tuner_layers()
        if any(layer.disable_adapters for layer in layers):
            raise RuntimeError(
                "All adapters of the model are disabled: enable them (`enable_adapters()`) before writing."
            )
        routed = [layer for layer in adapter_layers(self.model) if isinstance(layer, MemoryLayer) and layer.router]
        routers = [layer.router for layer in routed]
        with ExitStack() as stack:
            if not any(isinstance(layer, MemoryLayer) and layer.adds_virtual_tokens for layer in layers):
                stack.enter_context(virtual_tokens_disabled(self.model))
            stack.enter_context(self._enabled())
            try:
                for layer in routed:
                    layer.router = None
                yield
            finally:
                for layer, router in zip(routed, routers, strict=True):
                    layer.router = router

    def num_parameters(self) -> int:
        """Return how many numbers the memory stores."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the memory's tensors by their names on the model, without the adapter's name, as PEFT saves them."""
        self._check_attached()
        return own_tensors(self.model, self.adapter_name)

    def remove(self) -> None:
        """Remove the memory from its model. After the last adapter no hook, parameter, config or key is left.

        Base parameters that were trainable before the first memory are trainable again after the last one.
        """
        self._register_again()
        with exclusive_use(self.model):
            remove_adapter(self.model, self.adapter_name)
            forget_memory(self.model, self.adapter_name)

    # Files.

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Save `adapter_config.json`, `adapter_model.safetensors` and a model card (README.md), all or none.

        Files of a memory that was saved there before, and that this one does not have, are deleted; others stay.

        Raises:
            NotADirectoryError: If `save_directory` is a file.
            OSError: If its disk is full, or it cannot be written.
        """
        self._save(save_directory, [], self._base_id())

    def _save(
        self, save_directory: str | os.PathLike[str], examples: Sequence[CardExample], base_id: str | None
    ) -> None:
        self._register_again()
        check_path("save_directory", save_directory)
        with atomic_directory(save_directory) as staging:
            self._write_files(staging)
            card = model_card(self._config, self.num_parameters(), examples, base_model=base_id)
            (staging / CARD_FILE).write_text(card, encoding="utf-8")
            replace_memory(staging, Path(save_directory))

    def _write_files(self, folder: Path) -> None:
        """Write what the method saves: here its PEFT adapter."""
        tensors = {PEFT_KEY_PREFIX + name: tensor for name, tensor in self.state_dict().items()}
        write_tensors(folder / WEIGHTS_FILE, tensors)
        config = copy.copy(self._adapter_config)
        config.inference_mode = True
        if isinstance(targets := getattr(config, "target_modules", None), set):
            config.target_modules = sorted(targets)  # type: ignore[attr-defined]  # PEFT 0.21.0 writes a set in any order
        config.save_pretrained(str(folder))

    @classmethod
    def _read_files(cls, folder: Path, config: Any, decoder: Decoder) -> Any:
        """Read and check what `_write_files` wrote, for `_restore`; nothing is changed."""
        shapes = config.tensor_shapes(decoder)
        return read_tensors(folder / WEIGHTS_FILE, {PEFT_KEY_PREFIX + name: shape for name, shape in shapes.items()})

    @classmethod
    def _config_of_adapter(cls, config_file: Path) -> ConfigT | None:
        """Return the config of a memory of which transformers or PEFT saved its adapter alone, of a type of PEFT's own.

        None if the file is not that of such an adapter. What is beside it is read later, by `_read_files`.
        """
        return None

    def _restore(self, contents: Any) -> None:
        """Put what `_read_files` read into a memory that was just injected."""
        tensors = {name.removeprefix(PEFT_KEY_PREFIX): tensor for name, tensor in contents.items()}
        set_own_tensors(self.model, self.adapter_name, tensors)

    def export(
        self, save_directory: str | os.PathLike[str], *, format: str, dtype: torch.dtype | str | None = None
    ) -> Path:
        """Save the memory in another program's format. The memory and its model stay as they are.

        Nothing more can be written to an export, nor forgotten in it: keep what `save_pretrained` saves as well. Other
        adapters on the model are left out.

        Args:
            save_directory: A folder. An earlier export of the same format in it is replaced; its other files stay.
            format: One of the method's formats, such as `"vllm"`, `"gguf"` and `"merged"` for closed-form edits.
            dtype: Of the tensors: float32, bfloat16 or float16; None for the format's own default.

        Returns:
            What the other program is given: the folder, or a file in it.

        Raises:
            NotImplementedError: If the method has no format; says why.
            ValueError: If the method does not have this format, the format does not support this memory or dtype,
                nothing is written in the memory, or the folder holds a saved memory, or weights that would be loaded
                together with the export. No file is changed then.
            ModuleNotFoundError: If the format needs a package that is not installed.
            NotADirectoryError: If `save_directory` is a file.
        """
        self._register_again()
        exporters = self._exporters()
        if not exporters:
            raise NotImplementedError(f"{self._config.method_name} has no other format. {self.export_note}")
        if format not in exporters:
            offered = ", ".join(map(repr, exporters))
            raise ValueError(f"`format={format!r}` must be one of {offered} for {self._config.method_name}.")
        return export_files(exporters[format], save_directory, dtype)

    def _base_names(self) -> list[str]:
        """Return what the base model was loaded by, when the memory was made and now."""
        names = (self._config.base_model_name_or_path, getattr(self.model, "name_or_path", None))
        return [name for name in names if name]

    def _base_id(self) -> str | None:
        """Return the base model's repository on the Hub; None if it is not known."""
        ids = [EMBEDDED_ID if is_embedded(name) else hub_id(name) for name in self._base_names()]
        return next((found for found in ids if found), None)

    def _write_repository(self, folder: Path, base_model: str | None = None) -> None:
        base_id = base_model or self._base_id()
        if base_id is None and self._base_names():
            raise ValueError(
                f"`push_to_hub` needs `base_model='org/name'`, the base model's repository on the Hub: it was loaded "
                f"from {self._base_names()[0]!r}, a path on this machine."
            )
        examples: list[CardExample] = []
        if self.tokenizer is not None and not any(layer.disable_adapters for layer in self.tuner_layers()):
            examples = card_examples(
                self.model,
                self.tokenizer,
                self._config.written_items(),
                enabled=self._enabled,
                disabled=self.disabled,
                virtual_tokens=self._num_virtual_tokens(),
            )
        self._save(folder, examples, base_id)
        for file in [folder / name for name in CONFIG_FILES if (folder / name).is_file()]:
            values = {**read_json(file), "base_model_name_or_path": base_id}
            text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
            file.write_text(text + "\n", encoding="utf-8")

    def _num_virtual_tokens(self) -> int:
        """Return how many positions the memory uses before a prompt."""
        return 0

    def _replaced(self) -> list[str]:
        return saved_file_names()

    def __repr__(self) -> str:
        if not self.attached:
            return f"{type(self).__name__}({self.adapter_name!r}, removed)"
        state = "active" if self.active else "inactive"
        return f"{type(self).__name__}({self.adapter_name!r}, {state}, {self.num_parameters():,} parameters)"

    def _repr_html_(self) -> str:
        if not self.attached:
            return html.escape(repr(self))
        written = self._config.written_items()
        rows = [
            ("adapter", f"{self.adapter_name}, {'active' if self.active else 'inactive'}"),
            ("parameters", f"{self.num_parameters():,}"),
            ("written", f"{len(written):,} items" if written else "nothing yet"),
            *(("", repr(item)) for item in written[:SHOWN_ITEMS]),
            *([("", f"… {len(written) - SHOWN_ITEMS:,} more; see `items`")] if len(written) > SHOWN_ITEMS else []),
        ]
        return html_table(self._config.method_name, rows)


def evenly(values: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of `values`, evenly spread over them."""
    step = max(len(values) / most, 1)
    return [values[int(i * step)] for i in range(min(len(values), most))]


class _Measured:
    """Measure a memory before a write, and after it; see `WriteReport`."""

    def __init__(
        self,
        memory: Memory[Any],
        written: Sequence[Item],
        earlier: Sequence[Item],
        rows: Sequence[ScoredRow],
        progress: bool,
    ) -> None:
        self.memory, self.written, self.earlier, self.rows = memory, written, earlier, rows
        self.progress = progress
        with self._bar(2) as bar:
            self.scores, self.answers = self._now(bar)

    def _bar(self, steps: int) -> tqdm[Any]:
        return tqdm(total=steps, desc="measuring", unit="step", disable=not self.progress)

    def _now(self, bar: tqdm[Any]) -> tuple[Scores, list[str]]:
        with evaluating(self.memory.model):
            scores = self.memory._scores(self.rows)
            bar.update()
            answers = self.memory._unrelated_answers(self.written)
            bar.update()
        return scores, answers

    def after(self) -> dict[str, Any]:
        """Return the fields of a report."""
        count, before = len(self.written), self.scores
        with self._bar(3) as bar, evaluating(self.memory.model):
            after, answers = self._now(bar)
            results = self.memory._results([*self.written, *self.earlier], count, before, after)
            bar.update()
        same = share_same(self.answers, answers)
        new, old = range(count), range(count, count + len(self.earlier))
        notes = [*_missed(results), *_changed(same)]
        if before.perplexity > find_decoder(self.memory.model, self.memory._config.layers_path).vocab_size:
            notes.append(
                "the base model finds plain English harder than random tokens (perplexity "
                f"{before.perplexity:,.0f}): check that the tokenizer belongs to the model"
            )
        return dict(
            recall=after.recall(new),
            recall_before=before.recall(new),
            earlier_recall=after.recall(old),
            earlier_recall_before=before.recall(old),
            token_accuracy=after.token_accuracy,
            token_accuracy_before=before.token_accuracy,
            perplexity=after.perplexity,
            perplexity_before=before.perplexity,
            same=same,
            notes=notes,
            results=results,
        )


def _missed(results: Sequence[ItemResult]) -> list[str]:
    """Return a note on the items that are not recalled."""
    missed = [result for result in results if not result.recalled]
    if not missed:
        return []
    lost = sum(result.earlier for result in missed)
    earlier = f", {lost} of them from earlier writes" if lost else ""
    return [f"{len(missed)} of {len(results)} facts and questions are not recalled{earlier}"]


def _changed(same: float | None) -> list[str]:
    """Return a note if too many answers about other things are not what they were."""
    if same is None or same >= LEAST_SAME:
        return []
    return [
        f"{1 - same:.0%} of the model's answers about well-known other things changed: the memory acts where nothing "
        "was written"
    ]


def replace_memory(staging: Path, folder: Path) -> None:
    """Delete, with the next commit, files of a memory saved in `folder` that the one in `staging` does not have."""
    if (folder / CONFIG_FILE).is_file():
        replacing(staging, folder, saved_file_names())
