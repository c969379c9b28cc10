"""Memory slots as a `Memory`."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, overload

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from memory_adapters.base_model.decoder import Decoder, find_decoder
from memory_adapters.base_model.exclusive import alone, exclusive_use
from memory_adapters.base_model.modes import evaluating
from memory_adapters.card_examples import answers_to
from memory_adapters.files.names import PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.strict_json import file_in
from memory_adapters.files.tensors import read_tensors, write_tensors
from memory_adapters.items import Document, as_items
from memory_adapters.memory import Memory
from memory_adapters.memory_slots.config import MemorySlotsConfig
from memory_adapters.memory_slots.encoder import BATCH_TOKENS, Encoder, EncoderParts
from memory_adapters.memory_slots.export import EXPORTERS
from memory_adapters.memory_slots.layer import Entry
from memory_adapters.memory_slots.prompts import as_queries, as_text, scores
from memory_adapters.memory_slots.reader import CHILD, attach, detach, reader_of
from memory_adapters.memory_slots.slots import MemorySlots
from memory_adapters.memory_slots.write import Compressed, compress_texts, embedded_text
from memory_adapters.peft_layers.layers import remove_lora
from memory_adapters.peft_layers.rollback import rollback_on_error
from memory_adapters.report import WriteReport

__all__ = ["SlotMemory"]

SLOTS_FILE = MemorySlots.file


class SlotMemory(Memory):
    """A text compressed into vectors that the frozen model reads before every prompt.

    Attributes:
        slots: What is read now; several where each row of a batch reads its own; empty before anything is written.
    """

    config: MemorySlotsConfig
    optional_files: ClassVar[tuple[str, ...]] = (SLOTS_FILE,)
    exporters = EXPORTERS

    def __init__(self, model: nn.Module, adapter_name: str, config: MemorySlotsConfig, tokenizer: Any = None) -> None:
        super().__init__(model, adapter_name, config, tokenizer)
        decoder = find_decoder(model, config.layers_path)
        config.target_modules = sorted(config.modules(decoder))
        self._stack = model.get_submodule(decoder.stack_path)
        reader = attach(self._stack)
        entry = Entry(decoder.embedding_size)
        entry.add_module("parts", EncoderParts(config, decoder))
        reader.slot_entries[adapter_name] = entry.to(next(iter(entry.parts.parameters())).device)  # type: ignore[union-attr]
        self.encoder = Encoder(self.model, adapter_name, config, entry.parts)  # type: ignore[arg-type]
        for layer in self.encoder.layers():
            layer.lora_A[adapter_name].float(), layer.lora_B[adapter_name].float()
            layer.scaling[adapter_name] = 0.0  # its LoRA speaks only within `Encoder.active`
            layer._active_adapter = [name for name in layer.active_adapters if name != adapter_name]
        self.slots: list[MemorySlots] = []
        self._answered = (self.slots, config.answers)

    def tuner_layers(self) -> list[BaseTunerLayer]:
        """The reader: the encoder's LoRA takes no part in the model's own passes."""
        return [reader_of(self._stack)]

    def state_dict(self) -> dict[str, Tensor]:
        """The encoder's tensors."""
        self._check_attached()
        self._check_encoder()
        return self.encoder.tensors()

    def _check_encoder(self) -> None:
        if self.config.target_modules and not self.encoder.layers():
            raise RuntimeError(
                f"The encoder of {self.adapter_name!r} was taken off with another LoRA: its slots are still read, but "
                "nothing can be compressed or saved. Load the memory again, and use `merge_lora` to merge one LoRA."
            )

    def _check_writable(self) -> None:
        super()._check_writable()
        self._check_encoder()

    def _in_place(self) -> bool:
        reader = self._stack._modules.get(CHILD)
        return reader is not None and self.adapter_name in reader.slot_entries  # type: ignore[operator]

    def _rebase(self, fingerprint: dict[str, Any]) -> None:
        super()._rebase(fingerprint)
        self._read([replace(row, base_fingerprint=dict(self.config.base_fingerprint or {})) for row in self.slots])

    @alone
    def write(
        self, items: Any, *, refine_steps: int | None = None, compress: bool = True, progress: bool = True
    ) -> WriteReport:
        """Compress text, and let the model read it from now on, behind what was written before.

        Facts and questions are written out as text; the answer to their prompt is what refinement also asks for. If it
        fails or is interrupted, the memory is what it was before.

        Args:
            items: Strings (documents), `Document`, `Fact`, `QuestionAnswer`, mixed; one or many.
            refine_steps: Gradient steps on the slots; by default the config's.
            compress: False to keep the text whole: its own token embeddings are the slots, as if it stood before every
                prompt.
            progress: Show bars.

        Raises:
            TypeError: If an item is of no kind that can be written.
            ValueError: If there is no tokenizer, or slots and prompts would not fit in the model's positions.
        """
        start = time.perf_counter()
        listed = as_items(items)
        self._check_writable()
        steps = self._steps(refine_steps)
        asked = as_queries(self.tokenizer, listed)
        rows = self.slots
        with self._first_row_alone():
            before = scores(self.encoder, self.tokenizer, asked)
        text = as_text(listed)
        if compress:
            (made,) = compress_texts(self.encoder, self.tokenizer, [text], asked, steps, progress)
        else:
            made = Compressed(embedded_text(self.encoder, self.tokenizer, text + "\n"), [], None)
        with self._rollback_on_error():
            self._read([slots + made.slots for slots in rows] or [made.slots])
            with self._first_row_alone():
                after = scores(self.encoder, self.tokenizer, asked)
                answers = answers_to(self, listed, taken=self.slots[0].num_slots)
            report = WriteReport(
                method=self.config.method_name,
                num_items=dict(Counter(type(item).__name__ for item in listed)),
                recall=after[0],
                recall_before=before[0],
                token_accuracy=None if made.accuracy is None else made.accuracy[1],
                token_accuracy_before=None if made.accuracy is None else made.accuracy[0],
                perplexity=after[1],
                perplexity_before=before[1],
                losses=made.losses,
                num_parameters=self.num_parameters(),
                seconds=time.perf_counter() - start,
                notes=[
                    f"{made.slots.num_tokens} tokens in {made.slots.num_slots} slots of {made.slots.num_spans} "
                    f"span(s): compression rate {made.slots.compression_rate:.2f}"
                ],
                answers=answers,
            )
            self.config.record(report)
            self._answered = (self.slots, answers)
        return report

    @overload
    def compress(self, text: str, *, refine_steps: int | None = None, progress: bool = True) -> MemorySlots: ...

    @overload
    def compress(
        self, text: list[str] | tuple[str, ...], *, refine_steps: int | None = None, progress: bool = True
    ) -> list[MemorySlots]: ...

    @alone
    def compress(
        self, text: str | list[str] | tuple[str, ...], *, refine_steps: int | None = None, progress: bool = True
    ) -> MemorySlots | list[MemorySlots]:
        """Slots of a text, or of each of many (compressed in batches), without reading them: see `use`."""
        self._check_writable()
        texts = [Document(one).text for one in ([text] if isinstance(text, str) else text)]
        steps = self._steps(refine_steps)
        made = [one.slots for one in compress_texts(self.encoder, self.tokenizer, texts, [], steps, progress)]
        return made[0] if isinstance(text, str) else made

    def use(self, slots: MemorySlots | Sequence[MemorySlots] | None) -> None:
        """Let the model read these slots before every prompt; a list has slots for each row of a batch; None: none.

        Raises:
            ValueError: If slots belong to another model.
        """
        self._check_attached()
        rows = [] if slots is None else [slots] if isinstance(slots, MemorySlots) else list(slots)
        decoder = self.encoder.decoder
        own = self.encoder.fingerprint() if rows else ""
        for row in rows:
            row.check_fits(self.config.base_fingerprint, decoder.embedding_size)
            if row.encoder_fingerprint not in (own, None):
                warnings.warn(
                    "These slots were made by another encoder: the model reads them, but `reconstruct` may fail.",
                    stacklevel=2,
                )
        with exclusive_use(self.model), rollback_on_error(self._entry, self, self._config):
            slots_answered, answers = self._answered
            self.config.answers = answers if list(map(id, rows)) == list(map(id, slots_answered)) else []
            self._read(rows)

    def _read(self, rows: list[MemorySlots]) -> None:
        """As `use`, of slots that fit."""
        decoder = self.encoder.decoder
        longest = max((row.num_slots for row in rows), default=0)
        device = self.encoder.device
        vectors = torch.zeros(max(len(rows), 1), longest, decoder.embedding_size, device=device)
        mask = torch.zeros(max(len(rows), 1), longest, dtype=torch.long, device=device)
        for i, row in enumerate(rows):
            vectors[i, longest - row.num_slots :] = row.vectors
            mask[i, longest - row.num_slots :] = 1
        self._entry.vectors, self._entry.mask = vectors, mask
        self.slots = rows

    @property
    def _entry(self) -> Any:
        return reader_of(self._stack).slot_entries[self.adapter_name]

    @contextmanager
    def _first_row_alone(self) -> Iterator[None]:
        """Within this context every row of a batch reads the first of the slots, also where each has its own."""
        rows = self.slots
        if len(rows) > 1:
            self._read(rows[:1])
        try:
            yield
        finally:
            if len(rows) > 1:
                self._read(rows)

    @alone
    def reconstruct(self, max_new_tokens: int | None = None) -> list[str]:
        """The text of each row's slots, as the model decodes it greedily after [AE], each span by itself.

        Args:
            max_new_tokens: Of a span; by default twice the tokens that it has on average.
        """
        self._check_writable()
        before = self.slots
        spans = [span for row in before for span in row.split()]
        length = max_new_tokens or max((2 * math.ceil(row.num_tokens / row.num_spans) for row in before), default=0)
        length = min(length, getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or length)
        size = max(1, BATCH_TOKENS // max(length, 1))
        told: list[str] = []
        try:
            for start in range(0, len(spans), size):
                batch = spans[start : start + size]
                self._read(batch)
                asking = self.encoder.parts.reconstruct.expand(len(batch), 1, -1).to(self.model.dtype)
                with evaluating(self.model):
                    ids = self.model.generate(
                        inputs_embeds=asking,
                        attention_mask=asking.new_ones(asking.shape[:2], dtype=torch.long),
                        max_new_tokens=length,
                        do_sample=False,
                        eos_token_id=self.tokenizer.eos_token_id,
                        pad_token_id=self.tokenizer.eos_token_id,
                    )
                told += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        finally:
            self._read(before)
        rest = iter(told)
        return ["".join(next(rest) for _ in row.spans) for row in before]

    def _steps(self, asked: int | None) -> int:
        steps = self.config.resolved_refine_steps if asked is None else asked
        if type(steps) is not int or steps < 0:
            raise ValueError(f"`refine_steps` must be an integer of at least 0, got {asked!r}.")
        return steps

    def _detach(self) -> None:
        names = dict(enumerate(self.config.target_modules or [])) if self.encoder.layers() else {}
        remove_lora(self.model, names, self.adapter_name)
        reader = reader_of(self._stack)
        del reader.slot_entries[self.adapter_name]
        reader._active_adapter = [name for name in reader._active_adapter if name != self.adapter_name]
        if not reader.slot_entries:
            detach(self._stack)

    def _write_files(self, folder: Path) -> None:
        if len(self.slots) > 1:
            raise ValueError(f"{len(self.slots)} rows read slots of their own: save each with `MemorySlots.save`.")
        tensors = {PEFT_KEY_PREFIX + name: tensor for name, tensor in self.state_dict().items()}
        write_tensors(folder / WEIGHTS_FILE, tensors)
        config = copy.copy(self.config)
        config.has_slots, config.inference_mode = bool(self.slots), True
        config.save_pretrained(str(folder))
        for slots in self.slots:
            slots.save(folder / SLOTS_FILE)

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
        self._answered = ([] if slots is None else [slots], self.config.answers)
        self.use(slots)
