"""A gated LoRA as a `Memory`."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memory_adapters.base_model.decoder import Decoder, execution_device, find_decoder
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.item_rows import ScoredRow, plain_rows
from memory_adapters.base_model.modes import evaluating, own_settings
from memory_adapters.base_model.partial_forward import CACHE, positioned
from memory_adapters.base_model.tokens import pad_rows, tokenize
from memory_adapters.base_model.trial import differs, trial
from memory_adapters.files.names import CARD_FILE, CONFIG_FILE, PEFT_KEY_PREFIX, SETTINGS_FILE, WEIGHTS_FILE
from memory_adapters.files.tensors import read_tensors, write_tensors
from memory_adapters.gated_lora.config import GatedLoraConfig
from memory_adapters.gated_lora.layer import (
    ThingGate,
    factors_of,
    gate_lora,
    gated_matrices,
    reader_of,
    set_factors,
    set_lora,
)
from memory_adapters.gated_lora.write import Learned, learn, longest_row
from memory_adapters.items import Item, Items, as_items
from memory_adapters.keys.gate import GateState, KeyReader, KeySet
from memory_adapters.keys.things import Thing, things_of
from memory_adapters.memory import Memory, Outcome
from memory_adapters.peft_layers.layers import lora_linears, watch_switching
from memory_adapters.peft_layers.rollback import Restore, rollback_on_error
from memory_adapters.training.trainer import check_training_options

__all__ = ["GatedLoraMemory"]

KEYS_FILE = "keys.safetensors"
REMEDY = "A gated LoRA needs that; MemoryAdapterConfig does not."


class GatedLoraMemory(Memory[GatedLoraConfig]):
    """Train a small LoRA for each thing, which acts from where a prompt meets a key of it, and nowhere else.

    A second `write` leaves the LoRAs of other things as they are; a thing of which more is written is learned anew,
    with all that is known of it.

    Options of `write`:
        unrelated (`Sequence[str]`): Texts that have nothing to do with the items: keys stay closed on them. Sampled
            from the model by default.
    """

    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, KEYS_FILE, CARD_FILE)
    export_note: ClassVar[str] = (
        "Its folder is a LoRA adapter already (`save_pretrained`); without its gate, which other programs do not have, "
        "all of its things act at once, in every text."
    )

    def _attach(self, decoder: Decoder) -> None:
        config = self._config
        block = decoder.blocks[config.block]
        state = GateState.attach(self.model.get_submodule(decoder.stack_path))
        state.gated[self.adapter_name] = nn.Identity()
        reader = KeyReader.attach(block, state)
        keys = KeySet(decoder.hidden_size, config.key_owners, config.names, config.windows, held=True)
        reader.key_sets[self.adapter_name] = keys.to(execution_device(block))
        gate = ThingGate(reader, self.adapter_name, config.lora_rank)
        matrices = gated_matrices(self)
        for name, layer in matrices.items():
            gate_lora(layer, self.adapter_name, gate, name)
        watch_switching(next(iter(matrices.values())), self.adapter_name)

    def _try_model(self, decoder: Decoder) -> None:
        """Read a few tokens with all rows open, in parts with a cache and as a whole."""
        keys, device = self._keys(), execution_device(decoder.embeddings)
        before = keys.keys, keys.key_bias, keys.owners, keys.names, keys.windows
        ids = torch.tensor([[5, 6, 7]], device=device) % decoder.vocab_size
        with trial(self.model, "does not run a gated LoRA in the same way with a cache and without", REMEDY):
            try:
                keys.keys, keys.key_bias = keys.keys.new_zeros(1, decoder.hidden_size), keys.key_bias.new_ones(1)
                keys.owners, keys.names, keys.windows = [0], [[]], [0]
                whole = self.model(input_ids=ids, use_cache=False).logits[:, -1]
                mask = torch.ones_like(ids)
                first = self.model(input_ids=ids[:, :2], **positioned(self.model, mask[:, :2]), use_cache=True)
                if first.get(CACHE) is None:
                    raise ValueError("its passes give no cache of keys and values")
                rest = {**positioned(self.model, mask, 2), CACHE: first[CACHE]}
                if differs(self.model(input_ids=ids[:, 2:], **rest, use_cache=True).logits[:, -1], whole):
                    raise ValueError("other logits")
            finally:
                keys.keys, keys.key_bias, keys.owners, keys.names, keys.windows = before

    def _keys(self) -> KeySet:
        return reader_of(self).key_set(self.adapter_name)

    def route(self, texts: str | Sequence[str]) -> list[str | None]:
        """Return, for each text, what it is about: the thing whose LoRA acts first in it; None if none does.

        The names are those in `config.things`; see `export` for a server that has a LoRA for each.
        """
        listed = [texts] if isinstance(texts, str) else list(texts)
        tokenizer, decoder = self._require_tokenizer(), find_decoder(self.model, self._config.layers_path)
        inputs = pad_rows([tokenize(tokenizer, text) for text in listed], execution_device(decoder.embeddings))
        with exclusive_use(self.model), self._enabled(), torch.no_grad():
            self.model(**inputs, use_cache=False)
            opened = reader_of(self).pass_state.now().open[self.adapter_name]
        found: list[str | None] = []
        for mask in opened.mask:
            lengths = mask.sum(0)  # of what was open longest
            first = int(lengths.argmax()) if lengths.any() else None
            found.append(None if first is None else self._config.things[int(opened.things[first])])
        return found

    def _check_items(self, items: Sequence[Item], **options: Any) -> tuple[Sequence[Item], list[str]]:
        check_training_options(options, "")
        return items, []

    def _rows(self, items: Sequence[Item]) -> Sequence[ScoredRow]:
        return plain_rows(items, self._require_tokenizer(), longest_row(self))

    def _write(
        self, items: Sequence[Item], rows: Sequence[Any], *, progress: bool, unrelated: Sequence[str] | None = None
    ) -> Outcome:
        every = [*self._kept(items), *items]
        held = self._held()
        things = things_of(every, self._require_tokenizer())
        kept = {thing.name for thing in things if held.get(thing.name) == set(thing.items)}
        new = [thing for thing in things if thing.name not in kept]
        learned = self._replace(every, kept, new, unrelated=unrelated, progress=progress)
        return Outcome(losses=learned.losses, notes=learned.notes)

    def forget(self, items: Items) -> None:
        """Take items out again: the memory is what it would be had they never been written.

        Where all that was written about a thing is forgotten, nothing else changes, bit for bit, and no model pass is
        needed. Where something is left of it, the thing is learned anew.

        Args:
            items: One item or many, as they were written; see `items`.

        Raises:
            ValueError: If an item is not written, or a thing must be learned anew and there is no tokenizer; nothing
                is forgotten then.
        """
        gone = set(as_items(items, self.accepts))
        with exclusive_use(self.model), own_settings():
            self._register_again()
            written = self.items
            if missing := gone.difference(written):
                raise ValueError(f"`items` holds {next(iter(missing))!r}, which is not written; see `items`.")
            held = self._held()
            left = [item for own in held.values() if own & gone for item in written if item in own - gone]
            new = things_of(left, self._require_tokenizer()) if left else []
            every = [item for item in written if item not in gone]
            with rollback_on_error(*self._saved_state()), self._taking_part() if new else nullcontext():
                with evaluating(self.model):
                    kept = {name for name, own in held.items() if not own & gone}
                    self._replace(every, kept, new, unrelated=None, progress=False)
                self._config.set_items(every)

    def _held(self) -> dict[str, set[Item]]:
        """Return what is written about each thing."""
        config = self._config
        held: dict[str, set[Item]] = {name: set() for name in config.things}
        for item, index in zip(config.written_items(), config.item_things, strict=True):
            held[config.things[index]].add(item)
        return held

    def _replace(
        self,
        items: Sequence[Item],
        kept: Collection[str],
        new: Sequence[Thing],
        *,
        unrelated: Sequence[str] | None,
        progress: bool,
    ) -> Learned:
        """Let the memory hold these items: drop the things that are not kept, and learn the new ones."""
        config, keys = self._config, self._keys()
        learned = learn(self, new, unrelated=unrelated, progress=progress) if new else Learned.nothing()
        places = [i for i, name in enumerate(config.things) if name in kept]
        of_item = {
            item: place
            for place, old in enumerate(places)
            for item, index in zip(config.written_items(), config.item_things, strict=True)
            if index == old
        }
        of_item |= {item: len(places) + i for i, thing in enumerate(new) for item in thing.items}
        factors = {}
        for matrix, old in factors_of(self).items():
            own = old.things(places) if len(places) < len(config.things) else old
            added = learned.factors.get(matrix)
            factors[matrix] = own if added is None else own.with_more(added)
        set_factors(self, factors)
        keys.keep(places)
        keys.add(learned.keys, learned.bias, learned.owners, learned.names, learned.windows)
        config.things = [*(config.things[i] for i in places), *(thing.name for thing in new)]
        config.names, config.windows, config.key_owners = keys.names, keys.windows, keys.owners
        config.item_things = [of_item[item] for item in items]
        return learned

    def _saved_state(self) -> list[Restore]:
        linears = [lora_linears(layer, self.adapter_name) for layer in gated_matrices(self).values()]
        weights = [(down.weight.data, up.weight.data) for down, up in linears]

        def restore() -> None:  # weights are replaced, not written into
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
