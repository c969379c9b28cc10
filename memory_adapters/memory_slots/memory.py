"""Memory slots as a `Memory`."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.chat import turn_opening
from memory_adapters.base_model.decoder import Decoder, context_length
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.fingerprint import Fingerprint
from memory_adapters.base_model.item_rows import Row, ScoredRow, plain_rows
from memory_adapters.base_model.modes import generating, own_settings
from memory_adapters.base_model.partial_forward import keeps_keys_alone
from memory_adapters.base_model.scoring import Scores
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.base_model.trial import is_runnable, trial
from memory_adapters.files.exports import Exporter
from memory_adapters.files.names import PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.strict_json import SAVE_AGAIN, file_in
from memory_adapters.files.tensors import read_metadata, read_tensors, write_tensors
from memory_adapters.items import Document, Fact, Item, Items, QuestionAnswer
from memory_adapters.keys.spellings import Spellings
from memory_adapters.memory import Memory, Outcome
from memory_adapters.memory_slots.cached_reading import PromptStarts
from memory_adapters.memory_slots.config import MemorySlotsConfig
from memory_adapters.memory_slots.encoder import BATCH_TOKENS, Encoder, EncoderParts
from memory_adapters.memory_slots.entries import Chooser, Retriever, SlotEntry
from memory_adapters.memory_slots.entries_file import ENTRIES_FILE, load_entries
from memory_adapters.memory_slots.entry_writer import EntryWriter, renewed
from memory_adapters.memory_slots.export import prompt_tuning
from memory_adapters.memory_slots.layer import Entry, SlotReader, padded, reading_module
from memory_adapters.memory_slots.loss import as_queries
from memory_adapters.memory_slots.prompts import as_text
from memory_adapters.memory_slots.reading import Reading
from memory_adapters.memory_slots.reading_trial import try_reading
from memory_adapters.memory_slots.slots import MemorySlots
from memory_adapters.memory_slots.write import Compressed, compress_texts, embedded_text
from memory_adapters.peft_layers.rollback import Restore, rollback_on_error
from memory_adapters.validation import shown

__all__ = ["SlotMemory"]

SLOTS_FILE = MemorySlots.file
NOT_READ = "does not read slots before a prompt in the same way with a cache and without"
ONE_WAY = "Set `bidirectional=False`."
REMEDY = "Memory slots need that; MemoryAdapterConfig does not."
OTHER_ENCODER = "These slots were made by another encoder: the model reads them, but `reconstruct` may fail."


class SlotMemory(Memory[MemorySlotsConfig]):
    """Keep texts that the frozen model reads where a prompt asks for them, whole or compressed into vectors.

    `write` makes entries: all facts and questions about one thing are one, and a document has one for each of its
    parts. A prompt reads those that it names (see `MemorySlotsConfig.read`), in a chat inside the user's turn, before
    what is asked. With `read="all"` everything that is written is one text, which is compressed and read before every
    prompt. Facts and questions are written out as text; the answer to their prompt is what refinement also asks for.

    Options of `write`:

    * `compress` (`bool`): Whether the text is compressed; if not it is kept whole, and read as if it stood in the
      prompt. By default only where everything is one text, which an encoder compresses: see
      `MemorySlotsConfig.space`.
    * `refine_steps` (`int`): Gradient steps on what it is compressed into; by default the config's.

    Attributes:
        slots: What every prompt reads; several where each row of a batch reads its own; empty where entries are chosen.
    """

    optional_files: ClassVar[tuple[str, ...]] = (SLOTS_FILE, ENTRIES_FILE)

    def __init__(
        self,
        model: PreTrainedModel,
        adapter_name: str,
        config: MemorySlotsConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        configs: dict[str, Any] = model.peft_config
        configs[adapter_name] = config  # not the LoRA's, as which PEFT would save and load the encoder
        super().__init__(model, adapter_name, config, tokenizer)
        self.slots: list[MemorySlots] = []
        self._written: tuple[list[MemorySlots], list[dict[str, Any]]] = ([], [])  # slots, and the items they are of
        self._entries: list[SlotEntry] = []

    def _attach(self, decoder: Decoder) -> None:
        if is_runnable(decoder):
            with trial(self.model, NOT_READ, REMEDY):
                self._stack = reading_module(decoder)
        else:
            self._stack = cast(PreTrainedModel, self.model.get_submodule(decoder.stack_path))
        self._config.slots, self._config.entries = [], []  # the memory's whose config this was, if it was one's
        reader = SlotReader.attach(self._stack)
        # transformers takes the adapters of the first layer for the model's, and the dtype of the first parameter.
        _put_before(self._stack, SlotReader.child_name, decoder.blocks)
        cache = DynamicCache(config=self.model.config)
        indexed = any(hasattr(layer, "update_indexer") for layer in cache.layers)  # keys of an indexer, too
        reader.as_embeddings = indexed or not keeps_keys_alone(cache)
        if self.tokenizer is not None:
            self._config.opening = turn_opening(self.tokenizer)
        entry = Entry(decoder.embedding_size, self._config.opening)
        parts = EncoderParts(self._config, decoder)
        entry.add_module("parts", parts)
        reader.slot_entries[self.adapter_name] = entry.to(parts.reconstruct.device)
        self.encoder = Encoder(self.model, self.adapter_name, self._config, parts, decoder)
        self.encoder.disable()

    def _try_model(self, decoder: Decoder) -> None:
        """Compress a few tokens, and read two slots with a cache and padding, and without either."""
        if self._config.bidirectional:
            with trial(self.model, "takes no mask with which tokens attend to those behind them", ONE_WAY):
                self.encoder.check_bidirectional()
        with trial(self.model, "does not compress tokens into slots", REMEDY):
            if self._config.space != "kv":
                tokens = range(5, 5 + min(self._config.span_length, 8))
                self.encoder.slots([[token % decoder.vocab_size for token in tokens]])
        with trial(self.model, NOT_READ, REMEDY):
            try_reading(self.model, decoder, SlotReader.of(self._stack), self._entry)

    def tuner_layers(self) -> list[SlotReader]:
        """Return the reader: the encoder's LoRA takes no part in the model's own passes."""
        return [SlotReader.of(self._stack)] if self._in_place() else []

    def _in_place(self) -> bool:
        reader = self._stack._modules.get(SlotReader.child_name)
        return isinstance(reader, SlotReader) and self.adapter_name in reader.slot_entries

    def state_dict(self) -> dict[str, Tensor]:
        """Return the encoder's tensors."""
        self._check_attached()
        self._check_encoder()
        return self.encoder.tensors()

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the encoder's tensors as far as they are saved: see `Encoder.saved_tensors`."""
        self._check_attached()
        self._check_encoder()
        return self.encoder.saved_tensors()

    def num_parameters(self) -> int:
        """Return how many numbers the memory stores: the encoder's, slots, keys and values, and tokens of texts."""
        saved = sum(tensor.numel() for tensor in self.saved_tensors().values())
        return saved + sum(row.vectors.numel() for row in self.slots) + sum(one.num_numbers for one in self._entries)

    def _check_encoder(self) -> None:
        if self._config.target_modules and not self.encoder.layers():
            raise RuntimeError(
                f"The encoder of {self.adapter_name!r} was removed with another LoRA: its slots are still read, but "
                "nothing can be compressed or saved. Load the memory again, and use `merge_lora` to merge one LoRA."
            )

    def _check_writable(self) -> None:
        super()._check_writable()
        self._check_encoder()

    def _rebase(self, fingerprint: Fingerprint) -> None:
        before = dict(self._config.base_fingerprint or {})
        super()._rebase(fingerprint)
        mark = dict(self._config.base_fingerprint or {})
        if self._entries:
            entries = [
                dataclasses.replace(one, slots=one.slots and dataclasses.replace(one.slots, base_fingerprint=mark))
                for one in self._entries
            ]
            if mark != before:
                entries = renewed(entries, self._writer() if self.tokenizer else None, self.adapter_name)
            self._read_entries(entries)
        else:
            self._read([dataclasses.replace(row, base_fingerprint=mark) for row in self.slots])

    def _check_items(self, items: Sequence[Item], **options: Any) -> tuple[Sequence[Item], list[str]]:
        self._steps(options.get("refine_steps"))
        known = set(self.items)
        new = [item for item in dict.fromkeys(items) if item not in known]
        left = len(items) - len(new)
        return new, [f"{left} of {len(items)} items are read already: left out"] if left else []

    def _rows(self, items: Sequence[Item]) -> Sequence[ScoredRow]:
        """Return the rows of facts and questions; documents are judged by what refinement gives back."""
        asked = [i for i, item in enumerate(items) if not isinstance(item, Document)]
        rows = plain_rows([items[i] for i in asked], self._require_tokenizer(), context_length(self.model))
        return [dataclasses.replace(row, item=asked[row.item]) for row in rows]

    def _scores(self, rows: Sequence[ScoredRow]) -> Scores:
        with self._first_row_alone():
            return super()._scores(rows)

    def _unrelated_answers(self, written: Sequence[Item]) -> list[str]:
        with self._first_row_alone():
            return super()._unrelated_answers(written)

    def _answered_in_chat(self, items: Sequence[Fact | QuestionAnswer]) -> list[bool | None]:
        with self._first_row_alone():
            return super()._answered_in_chat(items)

    def _write(
        self,
        items: Sequence[Item],
        rows: Sequence[Row],
        *,
        progress: bool,
        refine_steps: int | None = None,
        compress: bool | None = None,
    ) -> Outcome:
        if self._config.has_entries:
            every, steps = [*self._kept(items), *items], self._steps(refine_steps)
            entries, outcome = self._writer().write(every, self._entries, bool(compress), steps, progress)
            self._read_entries(entries)
            return outcome
        text, before, tokenizer = as_text(items), self.slots, self._require_tokenizer()
        if compress is not False:
            steps = self._steps(refine_steps)
            (made,) = compress_texts(self.encoder, tokenizer, [text], as_queries(rows), steps, progress)
        else:
            made = Compressed(embedded_text(self.encoder, tokenizer, text + "\n"), [], None)
        self._read([slots + made.slots for slots in before] or [made.slots])
        slots = made.slots
        note = (
            f"{slots.num_tokens} tokens in {slots.num_slots} slots of {slots.num_spans} span(s): compression rate "
            f"{slots.compression_rate:.2f}"
        )
        return Outcome(losses=made.losses, notes=[note], reconstruction=made.accuracy)

    def _writer(self) -> EntryWriter:
        return EntryWriter(self.encoder, self._stack, self._require_tokenizer())

    @property
    def entries(self) -> list[SlotEntry]:
        """What is read together, in the order of writing; empty where everything is one text."""
        return list(self._entries)

    def entries_read(self, prompts: str | Sequence[str]) -> list[list[SlotEntry]]:
        """Return the entries that the model reads with each prompt, plain or a rendered chat, in their order."""
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        tokenizer, reading = self._require_tokenizer(), self._entry.choose
        if not isinstance(reading, Reading):
            return [[] for _ in listed]
        return reading.entries([tokenize(tokenizer, prompt) for prompt in listed])

    def _acts(self, ids: Sequence[int]) -> dict[str, list[float]] | None:
        reading = self._entry.choose
        if not isinstance(reading, Reading):  # what every prompt reads
            return None if self.slots else {}
        (read,) = reading.entries([ids])
        found = {}
        for entry in read:
            spans = list(Spellings((0, name) for name in (*entry.names, *entry.objects)).found(ids))
            within = {place for _, first, last in spans for place in range(first, last + 1)}
            found[entry.title] = [float(i in within) for i in range(len(ids))]
        return found

    def _read_entries(self, entries: Sequence[SlotEntry]) -> None:
        """Let the memory hold these entries, and prompts read those that they ask for."""
        self._entries = self._config.entries = list(entries)
        self._choose(self._entries)
        compressed = [entry.slots for entry in entries if entry.slots is not None]
        self._config.slots = [MemorySlots.concatenate(compressed)] if compressed else []

    def _choose(self, entries: Sequence[SlotEntry], retriever: Retriever | None = None) -> None:
        """Let prompts read those of some entries that they ask for, or that a retriever chooses."""
        self._read([])
        config = self._config
        chooser = Chooser(entries, config.read, config.top_k, self.tokenizer, retriever)
        embeddings = self.encoder.decoder.embeddings
        reading = Reading(chooser, embeddings, config.opening, context_length(self.model))
        self._entry.choose = reading if entries else None

    def _set_items(self, written: Sequence[Item]) -> None:
        if not self._config.has_entries:
            self._config.set_items([*self.items, *written])
        else:
            super()._set_items(written)
        self._written = (self.slots, self._config.items)

    def forget(self, items: Items) -> None:
        """Take items out again: the memory is what it would be had they never been written.

        With `read="all"` this needs slots that keep their text whole (`write(items, compress=False)`).

        Raises:
            NotImplementedError: If what is left was compressed with them: no slot is of one item alone.
            ValueError: If an item is not written; nothing is forgotten then.
        """
        kept_whole = self.slots and all(slots.num_slots == slots.num_tokens for slots in self.slots)
        if not self._config.has_entries and (len(self.slots) != 1 or not kept_whole):
            super().forget(items)
        with exclusive_use(self.model), own_settings():
            self._check_writable()
            gone, tokenizer = set(self._listed_written(items)), self._require_tokenizer()
            left = [item for item in self.items if item not in gone]
            with rollback_on_error(*self._saved_state()):
                if self._config.has_entries:
                    self._read_entries(self._writer().forget(left, self._entries, gone))
                else:
                    self._read([embedded_text(self.encoder, tokenizer, as_text(left) + "\n")] if left else [])
                self._config.items = []
                self._set_items(left)

    def _saved_state(self) -> list[Restore]:
        before, entries, choose, slots = self.slots, self._entries, self._entry.choose, self._config.slots

        def restore() -> None:
            self._read(before)
            self._entries = self._config.entries = entries
            self._entry.choose, self._config.slots = choose, slots

        return [restore, *super()._saved_state()]

    @overload
    def compress(self, text: str, *, refine_steps: int | None = None, progress: bool = True) -> MemorySlots: ...

    @overload
    def compress(
        self, text: list[str] | tuple[str, ...], *, refine_steps: int | None = None, progress: bool = True
    ) -> list[MemorySlots]: ...

    def compress(
        self, text: str | list[str] | tuple[str, ...], *, refine_steps: int | None = None, progress: bool = True
    ) -> MemorySlots | list[MemorySlots]:
        """Return the slots of a text, or of each of many (compressed in batches), without reading them: see `use`."""
        if self._config.space == "kv":
            raise ValueError(
                "`space='kv'` keeps keys and values of entries: call `write(text, compress=True)`, or set "
                "`space='embeddings'`."
            )
        texts = [Document(one).text for one in ([text] if isinstance(text, str) else text)]
        steps = self._steps(refine_steps)
        with exclusive_use(self.model), own_settings():
            self._check_writable()
            tokenizer = self._require_tokenizer()
            made = [one.slots for one in compress_texts(self.encoder, tokenizer, texts, [], steps, progress)]
        return made[0] if isinstance(text, str) else made

    def use(self, slots: MemorySlots | Sequence[MemorySlots] | Sequence[SlotEntry] | Retriever | None) -> None:
        """Let the model read this, instead of what was written.

        Args:
            slots: Slots that all prompts read; a list of slots has one for each row of a batch; entries (some of
                `entries`, or all again) are chosen among as the config says; a function takes the prompts of a batch
                as text, and returns the entries that each reads; None for nothing.

        Raises:
            ValueError: If slots belong to another model, or an entry is none of `entries`.
        """
        self._register_again()
        if callable(slots) and not self._entries:
            raise ValueError("`slots` is a function, but the memory has no `entries` to choose from: write first.")
        if callable(slots) or (isinstance(slots, Sequence) and any(isinstance(one, SlotEntry) for one in slots)):
            chosen = self._entries if callable(slots) else cast(Sequence[SlotEntry], slots)
            known = set(map(id, self._entries))
            if unknown := [one for one in chosen if id(one) not in known]:
                raise ValueError(f"`slots` has {shown(unknown[0])}, which is none of the memory's `entries`.")
            with exclusive_use(self.model), rollback_on_error(*self._saved_state()):
                self._choose(chosen, slots if callable(slots) else None)
            return
        given = cast("MemorySlots | Sequence[MemorySlots] | None", slots)
        rows = [] if given is None else [given] if isinstance(given, MemorySlots) else list(given)
        decoder = self.encoder.decoder
        own = self.encoder.fingerprint() if rows else ""
        for row in rows:
            row.check_fits(self._config.base_fingerprint, decoder.embedding_size)
            if row.encoder_fingerprint not in (own, None):
                warnings.warn(OTHER_ENCODER, stacklevel=2)
        with exclusive_use(self.model), rollback_on_error(*self._saved_state()):
            slots, items = self._written
            if not self._config.has_entries:
                as_written = list(map(id, rows)) == list(map(id, slots))
                self._config.items = items if as_written else []  # of others: not known
            self._read(rows)
            self._entry.choose = None

    def _read(self, rows: list[MemorySlots]) -> None:
        """Do as `use`, with slots that fit."""
        vectors, mask = padded([row.vectors for row in rows], self._entry.vectors)
        self._entry.vectors, self._entry.mask = vectors, mask
        SlotReader.of(self._stack).prompt_starts = PromptStarts()  # nothing is left of what is read no more
        self.slots = rows
        if not self._entries:
            self._config.slots = rows

    @property
    def _entry(self) -> Entry:
        return cast(Entry, SlotReader.of(self._stack).slot_entries[self.adapter_name])

    @contextmanager
    def _first_row_alone(self) -> Iterator[None]:
        """Let every row of a batch, within this context, read the first of the slots, also where each has its own."""
        rows = self.slots
        if len(rows) > 1:
            self._read(rows[:1])
        try:
            yield
        finally:
            if len(rows) > 1:
                self._read(rows)

    def reconstruct(self, max_new_tokens: int | None = None) -> list[str]:
        """Return the text of each row's slots, as the model decodes it greedily after [AE], each span by itself.

        Args:
            max_new_tokens: Of a span; by default twice the tokens that it has on average.
        """
        with exclusive_use(self.model), own_settings(), torch.no_grad():
            self._check_writable()
            before = self.slots
            spans = [span for row in before for span in row.split()]
            average = [math.ceil(row.num_tokens / row.num_spans) for row in before]
            length = min(max_new_tokens or 2 * max(average, default=0), context_length(self.model))
            size = max(1, BATCH_TOKENS // max(length, 1))
            decoded: list[str] = []
            try:
                for start in range(0, len(spans), size):
                    decoded += self._decoded(spans[start : start + size], length)
            finally:
                self._read(before)
        rest = iter(decoded)
        return ["".join(next(rest) for _ in row.spans) for row in before]

    def _decoded(self, spans: list[MemorySlots], length: int) -> list[str]:
        """Return the text that the model decodes behind each span's slots."""
        self._read(spans)
        tokenizer = self._require_tokenizer()
        asking = self.encoder.parts.reconstruct.expand(len(spans), 1, -1).to(self.model.dtype)  # (spans, 1, width)
        with generating(self.model):
            ids = self.model.generate(  # type: ignore[operator]  # PreTrainedModel is no GenerationMixin
                inputs_embeds=asking,
                attention_mask=asking.new_ones(asking.shape[:2], dtype=torch.long),
                max_new_tokens=length,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        return list(tokenizer.batch_decode(ids, skip_special_tokens=True))

    def _steps(self, asked: int | None) -> int:
        steps = self._config.resolved_refine_steps if asked is None else asked
        if type(steps) is not int or steps < 0:
            raise ValueError(f"`refine_steps` must be an integer of at least 0, got {asked!r}.")
        return steps

    def _num_virtual_tokens(self) -> int:
        return max((slots.num_slots for slots in self.slots), default=self._entry.most_slots)

    def _exporters(self) -> Mapping[str, Exporter]:
        return {"prompt-tuning": partial(prompt_tuning, self.slots, self.model)}

    def _write_files(self, folder: Path) -> None:
        tensors = {PEFT_KEY_PREFIX + name: tensor for name, tensor in self.saved_tensors().items()}
        write_tensors(folder / WEIGHTS_FILE, tensors)
        config = copy.copy(self._config)
        config.inference_mode = True
        config.save_pretrained(str(folder))

    @classmethod
    def _read_files(cls, folder: Path, config: MemorySlotsConfig, decoder: Decoder) -> Any:
        names = [name.removeprefix(PEFT_KEY_PREFIX) for name in read_metadata(folder / WEIGHTS_FILE)[0]]
        shapes = {PEFT_KEY_PREFIX + name: shape for name, shape in config.saved_shapes(decoder, names).items()}
        tensors = read_tensors(folder / WEIGHTS_FILE, shapes)
        slots = MemorySlots.load(file_in(folder, SLOTS_FILE)) if config.has_slots else None
        if slots is not None:
            slots.check_fits(config.base_fingerprint, decoder.embedding_size)
        entries = (
            load_entries(file_in(folder, ENTRIES_FILE), config.written_items(), slots, decoder.num_layers)
            if config.num_entries
            else []
        )
        if len(entries) != config.num_entries:
            raise ValueError(f"`{folder}` has {len(entries)} entries, its config {config.num_entries}. {SAVE_AGAIN}")
        return {name.removeprefix(PEFT_KEY_PREFIX): tensor for name, tensor in tensors.items()}, slots, entries

    def _restore(self, contents: tuple[dict[str, Tensor], MemorySlots | None, list[SlotEntry]]) -> None:
        tensors, slots, entries = contents
        with torch.no_grad():
            own = self.encoder.tensors()
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        if slots is not None and slots.encoder_fingerprint not in (self.encoder.fingerprint(), None):
            warnings.warn(OTHER_ENCODER, stacklevel=2)
        if entries:
            self._read_entries(entries)
            self._written = (self.slots, self._config.items)
        elif slots is not None:
            self._read([slots])
            self._written = (self.slots, self._config.items)


def _put_before(parent: nn.Module, name: str, blocks: nn.ModuleList) -> None:
    """Let a child module come right before the one that holds the blocks."""
    children = dict(parent._modules)
    moved = {name: children.pop(name)}
    holders = [other for other, child in children.items() if child is not None and blocks in set(child.modules())]
    place = list(children).index(holders[0]) if holders else 0
    ordered = list(children.items())
    parent._modules.clear()
    parent._modules.update([*ordered[:place], *moved.items(), *ordered[place:]])
