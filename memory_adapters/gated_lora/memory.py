"""A gated LoRA as a `Memory`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from memory_adapters.base_model.decoder import Decoder, find_decoder
from memory_adapters.base_model.item_rows import ScoredRow, plain_rows
from memory_adapters.base_model.seeding import seeded
from memory_adapters.files.exports import Exporter
from memory_adapters.files.names import CARD_FILE, CONFIG_FILE, PEFT_KEY_PREFIX, SETTINGS_FILE, WEIGHTS_FILE
from memory_adapters.files.tensors import read_tensors, write_tensors
from memory_adapters.gated_lora.config import GatedLoraConfig
from memory_adapters.gated_lora.export import vllm
from memory_adapters.gated_lora.layer import (
    ThingGate,
    factors_of,
    gate_lora,
    gated_matrices,
    keep_factors,
    set_factors,
    set_lora,
)
from memory_adapters.gated_lora.train import train
from memory_adapters.items import Item
from memory_adapters.keys.learning import learn_keys, longest_row
from memory_adapters.keys.thing_memory import Learned, ThingMemory, Values
from memory_adapters.keys.things import Thing
from memory_adapters.memory import Outcome
from memory_adapters.peft_layers.layers import lora_linears, watch_switching
from memory_adapters.peft_layers.rollback import Restore
from memory_adapters.training.trainer import check_training_options

__all__ = ["GatedLoraMemory"]

KEYS_FILE = "keys.safetensors"
REMEDY = "A gated LoRA needs that; MemoryAdapterConfig does not."


class GatedLoraMemory(ThingMemory[GatedLoraConfig]):
    """Train a small LoRA for each thing, which acts from where a prompt meets a key of it, and nowhere else.

    A second `write` leaves the LoRAs of other things as they are; a thing of which more is written is learned anew,
    with all that is known of it.

    Options of `write`:

    * `unrelated` (`Sequence[str]`): Texts that have nothing to do with the items: keys stay closed on them. Sampled
      from the model by default.
    """

    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, KEYS_FILE, CARD_FILE)

    def _attach(self, decoder: Decoder) -> None:
        gate = ThingGate(self._attach_gate(decoder), self.adapter_name, self._config.lora_rank)
        matrices = gated_matrices(self)
        for name, layer in matrices.items():
            gate_lora(layer, self.adapter_name, gate, name)
        watch_switching(next(iter(matrices.values())), self.adapter_name)

    def _try_model(self, decoder: Decoder) -> None:
        self._try_gate(decoder, REMEDY)

    def _exporters(self) -> Mapping[str, Exporter]:
        return {"vllm": partial(vllm, self)}

    def _check_items(self, items: Sequence[Item], **options: Any) -> tuple[Sequence[Item], list[str]]:
        check_training_options(options, "")
        return items, []

    def _rows(self, items: Sequence[Item]) -> Sequence[ScoredRow]:
        return plain_rows(items, self._require_tokenizer(), longest_row(self))

    def _write(
        self, items: Sequence[Item], rows: Sequence[Any], *, progress: bool, unrelated: Sequence[str] | None = None
    ) -> Outcome:
        return self._write_things(items, progress=progress, unrelated=unrelated)

    def _learn(self, things: Sequence[Thing], *, unrelated: Sequence[str] | None, progress: bool) -> Learned:
        decoder = find_decoder(self.model, self._config.layers_path)
        with seeded(self._config.seed):
            keys, rows = learn_keys(self, decoder, things, unrelated=unrelated, progress=progress)
            values, losses = train(self, decoder, rows, progress=progress)
        return Learned(keys, values, losses)

    def _values(self) -> dict[str, Values]:
        return factors_of(self)

    def _keep(self, places: Sequence[int]) -> None:
        if places:
            keep_factors(self, places)
        else:
            super()._keep(places)

    def _set_values(self, values: Mapping[str, Values]) -> None:
        set_factors(self, values)

    def _saved_state(self) -> list[Restore]:
        linears = [lora_linears(layer, self.adapter_name) for layer in gated_matrices(self).values()]
        weights = [(down.weight.data, up.weight.data) for down, up in linears]

        def restore() -> None:  # they are replaced, not written into
            for layer, (A, B) in zip(gated_matrices(self).values(), weights, strict=True):
                set_lora(layer, self.adapter_name, self._adapter_config, A, B)

        return [*super()._saved_state(), self._keys().saved(), restore]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the LoRA's tensors by their names on the model, as PEFT saves them; keys are saved beside them."""
        self._check_attached()
        return {
            f"{name}.lora_{letter}.weight": linear.weight.detach()
            for name, layer in gated_matrices(self).items()
            for letter, linear in zip("AB", lora_linears(layer, self.adapter_name), strict=True)
        }

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
        for name, layer in gated_matrices(self).items():
            A, B = (lora[f"{PEFT_KEY_PREFIX}{name}.lora_{letter}.weight"] for letter in "AB")
            set_lora(layer, self.adapter_name, self._adapter_config, A, B)
        with torch.no_grad():
            for name, buffer in self._keys().named_buffers():
                buffer.copy_(keys[name])
