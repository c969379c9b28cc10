"""A gated LoRA as a `Memory`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from memory_adapters.base_model.decoder import Decoder, execution_device, find_decoder
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.item_rows import ScoredRow, plain_rows
from memory_adapters.base_model.partial_forward import CACHE, positioned
from memory_adapters.base_model.tokens import pad_rows, tokenize
from memory_adapters.base_model.trial import differs, trial
from memory_adapters.files.names import CARD_FILE, CONFIG_FILE, PEFT_KEY_PREFIX, SETTINGS_FILE, WEIGHTS_FILE
from memory_adapters.files.tensors import read_tensors, write_tensors
from memory_adapters.gated_lora.config import GatedLoraConfig
from memory_adapters.gated_lora.layer import (
    GateState,
    KeyReader,
    KeySet,
    gate_lora,
    lora_parameters,
    loras_of,
    reader_of,
)
from memory_adapters.gated_lora.write import longest_row, write
from memory_adapters.items import Item
from memory_adapters.memory import Memory, Outcome
from memory_adapters.peft_layers.layers import lora_linears, watch_switching
from memory_adapters.peft_layers.rollback import Restore, saved_tensors
from memory_adapters.training.trainer import check_training_options

__all__ = ["GatedLoraMemory"]

KEYS_FILE = "keys.safetensors"
REMEDY = "A gated LoRA needs that; MemoryAdapterConfig does not."


class GatedLoraMemory(Memory[GatedLoraConfig]):
    """Train a LoRA that acts from where a prompt meets a key of what was written, and nowhere else.

    A second `write` trains the same LoRA, and items of earlier writes again with the new ones: else they would fade.

    Options of `write`:
        unrelated (`Sequence[str]`): Texts that have nothing to do with the items: keys stay closed on them. Sampled
            from the model by default.
        training_args (`Mapping[str, Any]`): Fields of `transformers.TrainingArguments` that the config does not have.
        callbacks (`Sequence[TrainerCallback]`): Trainer callbacks.
    """

    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, KEYS_FILE, CARD_FILE)
    export_note: ClassVar[str] = (
        "Its folder is a LoRA adapter already (`save_pretrained`); without its gate, which other programs do not have, "
        "it acts in every text."
    )

    def _attach(self, decoder: Decoder) -> None:
        block = decoder.blocks[self._config.block]
        state = GateState.attach(self.model.get_submodule(decoder.stack_path))
        state.gated[self.adapter_name] = nn.Identity()
        reader = KeyReader.attach(block, state)
        keys = KeySet(decoder.hidden_size, self._config.key_owners, self._config.names)
        reader.key_sets[self.adapter_name] = keys.to(execution_device(block))
        for layer in loras_of(self):
            gate_lora(layer, self.adapter_name, reader)
        watch_switching(loras_of(self)[0], self.adapter_name)

    def _try_model(self, decoder: Decoder) -> None:
        """Read a few tokens with all rows open, in parts with a cache and as a whole."""
        keys, device = self._keys(), execution_device(decoder.embeddings)
        before = keys.keys, keys.key_bias, keys.owners
        ids = torch.tensor([[5, 6, 7]], device=device) % decoder.vocab_size
        with trial(self.model, "does not run a gated LoRA in the same way with a cache and without", REMEDY):
            try:
                keys.keys, keys.key_bias = keys.keys.new_zeros(1, decoder.hidden_size), keys.key_bias.new_ones(1)
                keys.owners = [-1]
                whole = self.model(input_ids=ids, use_cache=False).logits[:, -1]
                mask = torch.ones_like(ids)
                first = self.model(input_ids=ids[:, :2], **positioned(self.model, mask[:, :2]), use_cache=True)
                if first.get(CACHE) is None:
                    raise ValueError("its passes give no cache of keys and values")
                rest = {**positioned(self.model, mask, 2), CACHE: first[CACHE]}
                if differs(self.model(input_ids=ids[:, 2:], **rest, use_cache=True).logits[:, -1], whole):
                    raise ValueError("other logits")
            finally:
                keys.keys, keys.key_bias, keys.owners = before

    def _keys(self) -> KeySet:
        return reader_of(self).key_set(self.adapter_name)

    def opens_on(self, texts: Sequence[str]) -> list[bool]:
        """Return, for each text, whether the memory takes part behind it."""
        tokenizer, decoder = self._require_tokenizer(), find_decoder(self.model, self._config.layers_path)
        inputs = pad_rows([tokenize(tokenizer, text) for text in texts], execution_device(decoder.embeddings))
        with exclusive_use(self.model), self._enabled(), torch.no_grad():
            self.model(**inputs, use_cache=False)
            opened = reader_of(self).pass_state.now().open[self.adapter_name]
        return [bool(row[mask.bool()].any()) for row, mask in zip(opened, inputs["attention_mask"], strict=True)]

    def _check_items(self, items: Sequence[Item], **options: Any) -> tuple[Sequence[Item], list[str]]:
        remedy = "set `memory.config.{field} = {value!r}` before `write` instead"
        check_training_options(options, remedy)
        return items, []

    def _rows(self, items: Sequence[Item]) -> Sequence[ScoredRow]:
        return plain_rows(items, self._require_tokenizer(), longest_row(self))

    def _write(
        self,
        items: Sequence[Item],
        rows: Sequence[Any],
        *,
        progress: bool,
        unrelated: Sequence[str] | None = None,
        training_args: Mapping[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> Outcome:
        arguments = {"disable_tqdm": not progress, **(training_args or {})}
        earlier = self._kept(items)
        return write(self, items, earlier, unrelated=unrelated, training_args=arguments, callbacks=callbacks)

    def _saved_state(self) -> list[Restore]:
        keys = self._keys()
        before, owners, names = dict(keys._buffers), list(keys.owners), list(keys.names)

        def restore_keys() -> None:  # they are replaced, not written into
            keys._buffers.update(before)
            keys.owners, keys.names = owners, names

        return [*super()._saved_state(), saved_tensors(lora_parameters(self).values()), restore_keys]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the LoRA's tensors by their names on the model, as PEFT saves them; keys are saved beside them."""
        self._check_attached()
        found: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer) and self.adapter_name in module.lora_A:
                for letter, linear in zip("AB", lora_linears(module, self.adapter_name), strict=True):
                    found[f"{name}.lora_{letter}.weight"] = linear.weight.detach()
        return found

    def _write_files(self, folder: Path) -> None:
        super()._write_files(folder)
        write_tensors(folder / KEYS_FILE, dict(self._keys().named_buffers()))
        text = json.dumps(self._config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def _read_files(cls, folder: Path, config: GatedLoraConfig, decoder: Decoder) -> Any:
        shapes = config.lora_shapes(decoder)
        lora = read_tensors(folder / WEIGHTS_FILE, {PEFT_KEY_PREFIX + name: shape for name, shape in shapes.items()})
        return lora, read_tensors(folder / KEYS_FILE, config.key_shapes(decoder))

    def _restore(self, contents: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
        lora, keys = contents
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                tensor.copy_(lora[PEFT_KEY_PREFIX + name])
            for name, buffer in self._keys().named_buffers():
                buffer.copy_(keys[name])
