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

from memory_adapters.base_model.decoder import Decoder, context_length
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.fingerprint import Fingerprint
from memory_adapters.base_model.item_rows import Row, ScoredRow, plain_rows
from memory_adapters.base_model.modes import evaluating, own_settings
from memory_adapters.base_model.partial_forward import CACHE, keeps_keys_alone, positioned
from memory_adapters.base_model.scoring import Scores
from memory_adapters.base_model.trial import differs, is_runnable, trial
from memory_adapters.files.exports import Exporter
from memory_adapters.files.names import PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.strict_json import file_in
from memory_adapters.files.tensors import read_tensors, write_tensors
from memory_adapters.items import Document, Fact, Item, Items, QuestionAnswer, as_items
from memory_adapters.memory import Memory, Outcome
from memory_adapters.memory_slots.config import MemorySlotsConfig
from memory_adapters.memory_slots.encoder import BATCH_TOKENS, Encoder, EncoderParts
from memory_adapters.memory_slots.export import prompt_tuning
from memory_adapters.memory_slots.layer import Entry, SlotReader, reading_module
from memory_adapters.memory_slots.prompts import as_queries, as_text
from memory_adapters.memory_slots.slots import MemorySlots
from memory_adapters.memory_slots.write import Compressed, compress_texts, embedded_text
from memory_adapters.peft_layers.rollback import Restore, rollback_on_error

__all__ = ["SlotMemory"]

SLOTS_FILE = MemorySlots.file
NOT_READ = "does not read slots before a prompt in the same way with a cache and without"
REMEDY = "Memory slots need that; MemoryAdapterConfig does not."
OTHER_ENCODER = "These slots were made by another encoder: the model reads them, but `reconstruct` may fail."


class SlotMemory(Memory[MemorySlotsConfig]):
    """Compress a text into vectors that the frozen model reads before every prompt.

    `write` compresses items, which are read from then on behind what was written before. Facts and questions are
    written out as text; the answer to their prompt is what refinement also asks for.

    Options of `write`:
        refine_steps (`int`): Gradient steps on the slots; by default the config's.
        compress (`bool`): False to keep the text whole: its own token embeddings are the slots, as if it stood before
            every prompt.

    Attributes:
        slots: What is read now; several where each row of a batch reads its own; empty before anything is written.
    """

    optional_files: ClassVar[tuple[str, ...]] = (SLOTS_FILE,)

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

    def _attach(self, decoder: Decoder) -> None:
        if is_runnable(decoder):
            with trial(self.model, NOT_READ, REMEDY):
                self._stack = reading_module(decoder)
        else:
            self._stack = cast(PreTrainedModel, self.model.get_submodule(decoder.stack_path))
        self._config.slots = []  # those of the memory whose config this was, if it was one's
        reader = SlotReader.attach(self._stack)
        # transformers takes the adapters of the first layer for the model's, and the dtype of the first parameter.
        _put_before(self._stack, SlotReader.child_name, decoder.blocks)
        cache = DynamicCache(config=self.model.config)
        indexed = any(hasattr(layer, "update_indexer") for layer in cache.layers)  # keys of an indexer, too
        reader.as_embeddings = indexed or not keeps_keys_alone(cache)
        entry = Entry(decoder.embedding_size)
        parts = EncoderParts(self._config, decoder)
        entry.add_module("parts", parts)
        reader.slot_entries[self.adapter_name] = entry.to(parts.reconstruct.device)
        self.encoder = Encoder(self.model, self.adapter_name, self._config, parts, decoder)
        self.encoder.disable()

    def _try_model(self, decoder: Decoder) -> None:
        """Compress a few tokens, and read two slots with a cache and padding, and without either."""
        with trial(self.model, "does not compress tokens into slots", REMEDY):
            self.encoder.slots([[token % decoder.vocab_size for token in range(5, 5 + self._config.span_length)][:8]])
        entry, reader = self._entry, SlotReader.of(self._stack)
        before = entry.vectors, entry.mask
        ids = torch.tensor([[9, 7, 8]], device=self.encoder.device) % decoder.vocab_size
        with trial(self.model, NOT_READ, REMEDY):
            try:
                # Between two tokens: some models look up what else they read of a token by its very embedding.
                entry.vectors = (
                    decoder.embeddings(torch.cat([ids, ids + 1])).detach().float().mean(0, keepdim=True)[:, :2]
                )
                entry.mask = torch.ones(1, 2, dtype=torch.long, device=ids.device)
                if not reader.as_embeddings and not self._reads_alike(ids):
                    reader.as_embeddings = True
                if reader.as_embeddings and not self._reads_alike(ids):
                    raise ValueError("other logits")
            finally:
                entry.vectors, entry.mask = before

    def _reads_alike(self, ids: Tensor) -> bool:
        """Return whether two rows of tokens, one of them padded, are read in parts with a cache as they are whole."""
        rows = torch.cat([torch.nn.functional.pad(ids[:, 1:], (1, 0)), ids])  # the first begins with padding
        mask = torch.ones_like(rows)
        mask[0, 0] = 0
        whole = [
            self.model(input_ids=row[own.bool()][None], use_cache=False).logits[0, -1]
            for row, own in zip(rows, mask, strict=True)
        ]
        first = self.model(input_ids=rows[:, :-1], **positioned(self.model, mask[:, :-1]), use_cache=True)
        if first.get(CACHE) is None:
            raise ValueError("its passes give no cache of keys and values")
        rest = {**positioned(self.model, mask, rows.shape[1] - 1), CACHE: first[CACHE]}
        in_parts = self.model(input_ids=rows[:, -1:], **rest, use_cache=True).logits[:, -1]
        without_positions = self.model(input_ids=rows, attention_mask=mask, use_cache=True).logits[:, -1]
        found = zip([*in_parts, *without_positions], whole * 2, strict=True)
        return not any(differs(one, other) for one, other in found)

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
        super()._rebase(fingerprint)
        self._read(
            [dataclasses.replace(row, base_fingerprint=dict(self._config.base_fingerprint or {})) for row in self.slots]
        )

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
        compress: bool = True,
    ) -> Outcome:
        text, before, tokenizer = as_text(items), self.slots, self._require_tokenizer()
        if compress:
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

    def _set_items(self, written: Sequence[Item]) -> None:
        self._config.set_items([*self.items, *written])
        self._written = (self.slots, self._config.items)

    def forget(self, items: Items) -> None:
        """Take items out again, of slots that keep their text whole (`write(items, compress=False)`).

        Raises:
            NotImplementedError: If the text is compressed: no slot is of one item alone.
            ValueError: If an item is not written; nothing is forgotten then.
        """
        gone = as_items(items, self.accepts)
        kept_whole = self.slots and all(slots.num_slots == slots.num_tokens for slots in self.slots)
        if len(self.slots) != 1 or not kept_whole:
            super().forget(items)
        with exclusive_use(self.model), own_settings():
            self._check_writable()
            left, tokenizer = self.items, self._require_tokenizer()
            for item in gone:
                if item not in left:
                    raise ValueError(f"`items` holds {item!r}, which is not written; see `items`.")
                left.remove(item)
            with rollback_on_error(*self._saved_state()):
                self._read([embedded_text(self.encoder, tokenizer, as_text(left) + "\n")] if left else [])
                self._config.items = []
                self._set_items(left)

    def _saved_state(self) -> list[Restore]:
        before = self.slots
        return [lambda: self._read(before), *super()._saved_state()]

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
        texts = [Document(one).text for one in ([text] if isinstance(text, str) else text)]
        steps = self._steps(refine_steps)
        with exclusive_use(self.model), own_settings():
            self._check_writable()
            tokenizer = self._require_tokenizer()
            made = [one.slots for one in compress_texts(self.encoder, tokenizer, texts, [], steps, progress)]
        return made[0] if isinstance(text, str) else made

    def use(self, slots: MemorySlots | Sequence[MemorySlots] | None) -> None:
        """Let the model read these slots before every prompt, instead of what was written.

        Args:
            slots: One for all prompts; a list has one for each row of a batch; None for none.

        Raises:
            ValueError: If slots belong to another model.
        """
        self._register_again()
        rows = [] if slots is None else [slots] if isinstance(slots, MemorySlots) else list(slots)
        decoder = self.encoder.decoder
        own = self.encoder.fingerprint() if rows else ""
        for row in rows:
            row.check_fits(self._config.base_fingerprint, decoder.embedding_size)
            if row.encoder_fingerprint not in (own, None):
                warnings.warn(OTHER_ENCODER, stacklevel=2)
        with exclusive_use(self.model), rollback_on_error(*self._saved_state()):
            slots, items = self._written
            self._config.items = items if list(map(id, rows)) == list(map(id, slots)) else []  # of others: not known
            self._read(rows)

    def _read(self, rows: list[MemorySlots]) -> None:
        """Do as `use`, with slots that fit."""
        decoder = self.encoder.decoder
        longest = max((row.num_slots for row in rows), default=0)
        device = self.encoder.device
        vectors = torch.zeros(max(len(rows), 1), longest, decoder.embedding_size, device=device)
        mask = torch.zeros(max(len(rows), 1), longest, dtype=torch.long, device=device)
        for i, row in enumerate(rows):
            vectors[i, longest - row.num_slots :] = row.vectors
            mask[i, longest - row.num_slots :] = 1
        self._entry.vectors, self._entry.mask = vectors, mask
        self.slots = self._config.slots = rows

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
        with evaluating(self.model):
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
        return max((slots.num_slots for slots in self.slots), default=0)

    def _exporters(self) -> Mapping[str, Exporter]:
        return {"prompt-tuning": partial(prompt_tuning, self.slots, self.model)}

    def _write_files(self, folder: Path) -> None:
        tensors = {PEFT_KEY_PREFIX + name: tensor for name, tensor in self.state_dict().items()}
        write_tensors(folder / WEIGHTS_FILE, tensors)
        config = copy.copy(self._config)
        config.inference_mode = True
        config.save_pretrained(str(folder))

    @classmethod
    def _read_files(cls, folder: Path, config: MemorySlotsConfig, decoder: Decoder) -> Any:
        shapes = config.tensor_shapes(decoder)
        tensors = read_tensors(folder / WEIGHTS_FILE, {PEFT_KEY_PREFIX + name: s for name, s in shapes.items()})
        slots = MemorySlots.load(file_in(folder, SLOTS_FILE)) if config.has_slots else None
        if slots is not None:
            slots.check_fits(config.base_fingerprint, decoder.embedding_size)
        return {name.removeprefix(PEFT_KEY_PREFIX): tensor for name, tensor in tensors.items()}, slots

    def _restore(self, contents: tuple[dict[str, Tensor], MemorySlots | None]) -> None:
        tensors, slots = contents
        with torch.no_grad():
            for name, tensor in self.encoder.tensors().items():
                tensor.copy_(tensors[name])
        if slots is not None:
            if slots.encoder_fingerprint not in (self.encoder.fingerprint(), None):
                warnings.warn(OTHER_ENCODER, stacklevel=2)
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
