"""A closed-form edit as a `Memory`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from peft import LoraConfig
from torch import Tensor

from memory_adapters.base_model.chat import rendered_question
from memory_adapters.base_model.decoder import Decoder, context_length
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.fingerprint import base_fingerprint, check_fingerprint, warn_if_unmarked
from memory_adapters.base_model.item_rows import ScoredRow
from memory_adapters.base_model.modes import own_settings
from memory_adapters.files.atomic import atomic_directory
from memory_adapters.files.exports import Exporter
from memory_adapters.files.names import CARD_FILE, CONFIG_FILE, PEFT_KEY_PREFIX, SETTINGS_FILE, WEIGHTS_FILE
from memory_adapters.files.strict_json import file_in, read_json
from memory_adapters.files.tensors import read_metadata, read_tensors, tensors_digest, write_tensors
from memory_adapters.items import Fact, Item, Items, asked_by, by_subject
from memory_adapters.keys.gate import KeyReader, KeySet
from memory_adapters.keys.thing_memory import opened_tokens
from memory_adapters.keys.things import NAME_WINDOW
from memory_adapters.memit.config import MemitConfig
from memory_adapters.memit.corpus import Texts
from memory_adapters.memit.covariance import Covariance
from memory_adapters.memit.covariance_cache import cached_covariance, covariance_file, keep_covariance
from memory_adapters.memit.covariance_fitter import CovarianceFitter
from memory_adapters.memit.export import EXPORTERS
from memory_adapters.memit.files import (
    adapter_shapes,
    check_adapter_config,
    edit_digest,
    read_adapter,
    read_covariance,
)
from memory_adapters.memit.gating import FoundKeys, attach_gate, found_keys, gate_lora
from memory_adapters.memit.layer import set_lora_factors
from memory_adapters.memit.ledger import Factors, Ledger
from memory_adapters.memit.prompts import FactRow, bare_rows
from memory_adapters.memit.solvers import cost_of
from memory_adapters.memit.trial import check_resuming
from memory_adapters.memit.write import LedgerBuilder
from memory_adapters.memory import Memory, Outcome, replace_memory
from memory_adapters.peft_layers.layers import adapter_layers, lora_layers, lora_linears, watch_switching
from memory_adapters.peft_layers.rollback import Restore, rollback_on_error

__all__ = ["MemitMemory"]

LEDGER_FILE, KEYS_FILE = "ledger.safetensors", "keys.safetensors"
DESCRIBING = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type", "auto_mapping")


class MemitMemory(Memory[MemitConfig]):
    """Solve facts into the MLP output projections of a few blocks: an ordinary LoRA adapter, and a ledger.

    `write` adds facts; a fact about the same subject and relation as an earlier one replaces it. Facts about one
    subject are learned together, with those of earlier writes. The result does not depend on how facts are divided
    among writes, nor on their order.

    Options of `write`:

    * `covariance` (`Covariance`, or a path or repository on the Hub): C₀. By default that of the last write, or else
      of text that the model samples.
    * `targets` (`MemitMemory`): Another memory on the same blocks, whose keys and shares are taken for the subjects of
      which it holds the same facts: other solvers, settings of the solve and C₀ can be tried without a pass.

    Attributes:
        ledger: What was written, subject by subject.
        covariance: C₀ of the last write in this process, or that was saved with the memory; None before.
    """

    accepts = (Fact,)
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, LEDGER_FILE, CARD_FILE)
    optional_files: ClassVar[tuple[str, ...]] = (KEYS_FILE,)
    files_beside: ClassVar[tuple[str, ...]] = (Covariance.file,)

    _names: dict[int, str]  # of the edited projections, by block
    _widths: dict[int, int]  # their d_in
    _ledger: Ledger | None  # None where only the adapter was saved
    covariance: Covariance | None = None

    def _attach(self, decoder: Decoder) -> None:
        self._names, self._widths = self._config.projection_names(decoder), self._config.widths(decoder)
        self.ledger = Ledger.empty(self._widths, decoder.hidden_size, **self._config.ledger_settings)
        self._set_factors(self.ledger)  # a LoRA of rank 1 has random factors until then
        layers = lora_layers(self.model, self._names)
        if self._config.gate:
            reader = attach_gate(self.model, decoder, self._config, self.adapter_name)
            for layer in layers.values():
                gate_lora(layer, self.adapter_name, reader)
        watch_switching(next(iter(layers.values())), self.adapter_name)

    def _keys(self) -> KeySet:
        """Return the keys of a gated edit."""
        readers = [x for x in adapter_layers(self.model, self.adapter_name) if isinstance(x, KeyReader)]
        return readers[0].key_set(self.adapter_name)

    def _try_model(self, decoder: Decoder) -> None:
        check_resuming(decoder, min(self._names) - 1)

    @property
    def ledger(self) -> Ledger:
        """What was written, subject by subject.

        Raises:
            NotImplementedError: If the memory was loaded from a folder without a ledger.
        """
        if self._ledger is None:
            raise NotImplementedError(
                f"{self.adapter_name!r} was loaded from an adapter without its ledger, as transformers and PEFT save "
                "edits: it can be used, switched off, saved and exported, but its facts are not known, and none can be "
                "written or forgotten. Load what the memory's own `save_pretrained` saved, or write the facts to a new "
                "memory."
            )
        return self._ledger

    @ledger.setter
    def ledger(self, value: Ledger) -> None:
        self._ledger = value

    @property
    def items(self) -> list[Item]:
        """The facts that are written, in the order of the ledger."""
        self._check_attached()
        return list(self.ledger.facts)

    def fit_covariance(self, texts: Texts | None = None, num_tokens: int | None = None, **settings: Any) -> Covariance:
        """Fit C₀ of the blocks that this memory edits, without the memory; it is kept for the writes to come.

        That of sampled text is kept in `$MEMORY_ADAPTERS_CACHE` (by default `~/.cache/memory-adapters`) too, and read
        there by any later process with the same model.

        Args:
            texts: See `CovarianceFitter.fit`; None for text that the model samples from itself.
            num_tokens: Budget; by default the config's `covariance_tokens`.
            settings: Passed on to `CovarianceFitter.fit` or `.sample`.
        """
        with exclusive_use(self.model), own_settings():
            self._check_writable()
            budget = num_tokens or self._config.covariance_tokens
            model, tokenizer, path = self.model, self._require_tokenizer(), self._config.layers_path
            with self.disabled():
                fitter, file, found = (
                    CovarianceFitter(model, tokenizer, list(self._names), layers_path=path),
                    None,
                    None,
                )
                if texts is None:
                    seed = self._config.seed
                    file = covariance_file(
                        model, tokenizer, fitter.layers, num_tokens=budget, seed=seed, layers_path=path
                    )
                    found = None if file is None else cached_covariance(file, fitter.layers)
                    if found is None:
                        fitter.sample(budget, seed=seed, **settings)
                else:
                    fitter.fit(texts, budget, **settings)
            self.covariance = found or fitter.covariance()
            if file is not None and found is None:
                keep_covariance(file, self.covariance)
            return self.covariance

    def _check_items(self, items: Sequence[Item], **options: Any) -> tuple[Sequence[Item], list[str]]:
        facts, notes = cast(Sequence[Fact], items), []
        taken = {asked_by(fact): fact for fact in facts}
        replaced = sum(taken.get(asked_by(fact), fact) != fact for fact in self.ledger.facts)
        if again := sum(taken.get(asked_by(fact)) == fact for fact in self.ledger.facts):
            notes.append(f"{again} fact(s) written already are written anew")
        if replaced:
            notes.append(f"{replaced} fact{'s' * (replaced > 1)} about the same subject and relation replaced")
        return facts, notes

    def _rows(self, items: Sequence[Fact]) -> Sequence[ScoredRow]:
        """Return the rows of the bare prompts: the report says of each fact whether a chat names its target."""
        return bare_rows(items, self._require_tokenizer(), context_length(self.model))

    def _write(
        self,
        items: Sequence[Fact],
        rows: Sequence[FactRow],
        *,
        progress: bool,
        covariance: Covariance | str | os.PathLike[str] | None = None,
        targets: MemitMemory | None = None,
    ) -> Outcome:
        self._config.chat = self._in_chat()
        if targets is not None:
            self._check_targets(targets)
        used = self._covariance(covariance, progress)
        every = [*cast(Sequence[Fact], self._kept(items)), *items]
        notes = self._learn(every, set(items), used, targets, progress=progress)
        return Outcome(notes=[f"covariance of {used.num_tokens:,} tokens of {used.source}", *notes])

    def _check_targets(self, targets: MemitMemory) -> None:
        """Raise a `ValueError` if another memory's keys are not of this one's blocks and contexts."""
        each, own = targets.ledger.keys_per_subject, self._config.keys_per_subject
        if targets.ledger.layers != list(self._names) or (targets.items and own not in (1, each)):
            raise ValueError(
                f"`targets` has {each} keys a subject at blocks {targets.ledger.layers}, and this memory {own} at "
                f"{list(self._names)}: give a memory with the same `layers`, `num_prefixes` and `chat`."
            )

    def _in_chat(self) -> bool:
        """Return whether facts are taught in the chat template too."""
        asked = self._config.chat
        return rendered_question(self._require_tokenizer(), "{prompt}") is not None if asked is None else asked

    def _learn(
        self,
        facts: Sequence[Fact],
        new: Set[Fact],
        used: Covariance | None,
        targets: MemitMemory | None = None,
        *,
        progress: bool,
    ) -> list[str]:
        """Let the memory hold these facts, and return notes; subjects whose facts are what they were stay as they are.

        Args:
            facts: All facts.
            new: Those of them that are learned in any case.
            used: C₀.
            targets: As in `write`.
            progress: Show bars.
        """
        config = self._config
        held = {frozenset(own): place for place, own in enumerate(self.ledger.subjects)}
        about = by_subject(facts)
        kept = [held[frozenset(own)] for own in about if frozenset(own) in held and new.isdisjoint(own)]
        fresh = [own for own in about if frozenset(own) not in held or not new.isdisjoint(own)]
        ledger = replace(self.ledger.subset(kept), **config.ledger_settings)
        notes: list[str] = []
        found = None
        if fresh and used is not None:
            shrunk = {layer: used.shrunk(layer, config.shrinkage) for layer in self._names}
            costs = {
                layer: cost_of(config.solver, layer, C0, null_space=config.null_space) for layer, C0 in shrunk.items()
            }
            known = set() if targets is None else set(map(frozenset, targets.ledger.subjects))
            fresh.sort(key=lambda own: frozenset(own) not in known)  # a gate's keys are in the order of the ledger
            unknown = [own for own in fresh if frozenset(own) not in known]
            if targets is not None and len(unknown) < len(fresh):
                ledger = ledger.plus(targets.ledger.entries_of(fresh, config.keys_per_subject), costs)
            with self.disabled():
                builder = LedgerBuilder(self.model, self._require_tokenizer(), config)
                if unknown:
                    ledger = ledger.plus(builder.entries(unknown, progress), costs)
                notes = builder.notes
                if config.gate:
                    found = found_keys(self.model, builder.decoder, config, builder.tokenizer, fresh)
        if config.gate:
            self._set_keys(kept, found)
            notes = [*notes, *(found[2] if found else [])]
        self._set_factors(ledger)
        self.ledger, self.covariance = ledger, used
        return notes

    def _set_keys(self, kept: Sequence[int], found: FoundKeys | None) -> None:
        """Drop the keys of all subjects but these, and add those that were found."""
        keys = self._keys()
        keys.keep(kept)
        if found is not None:
            of_block, names, _ = found
            keys.add(of_block.weights, of_block.bias, of_block.owners, names, [NAME_WINDOW] * len(names))
        self._config.names, self._config.key_owners = keys.names, keys.owners

    def _covariance(self, given: Covariance | str | os.PathLike[str] | None, progress: bool) -> Covariance:
        """Return the covariance to write with, which must belong to this model."""
        if given is None:
            return self.covariance or self.fit_covariance(progress=progress)
        used = given if isinstance(given, Covariance) else Covariance.load(given)
        warn_if_unmarked(used.base_fingerprint, "`covariance`")
        check_fingerprint(used.base_fingerprint, base_fingerprint(self.model, self._config.layers_path))
        used.check_widths(self._widths)
        return used

    def _set_items(self, written: Sequence[Item]) -> None:
        self._config.set_items(self.ledger.facts)

    def forget(self, items: Items) -> None:
        """Take facts out again: the edit is what it would be had they never been written.

        Needs no model pass where all facts about a subject are forgotten. A subject of which some are left is learned
        anew with these, with C₀ of the last write in this process or the one that was saved with the memory, else of
        text that the model samples.

        Raises:
            TypeError: If an item is not a `Fact`.
            ValueError: If a fact is not in the memory, or a subject must be learned anew and there is no tokenizer;
                nothing is forgotten then.
        """
        with exclusive_use(self.model), own_settings():
            self._register_again()
            gone = set(self._listed_written(items))
            left = [fact for fact in self.ledger.facts if fact not in gone]
            held = set(map(frozenset, self.ledger.subjects))
            anew = any(frozenset(own) not in held for own in by_subject(left))
            if anew:
                self._check_writable()
            with rollback_on_error(*self._saved_state()), self._taking_part() if anew else nullcontext():
                used = self._covariance(None, progress=False) if anew else self.covariance
                self._learn(left, set(), used, progress=False)
                self._set_items([])

    def _set_factors(self, ledger: Ledger | None = None, factors: Mapping[int, Factors] | None = None) -> None:
        """Let the LoRA adapter be the edit of a ledger, or of factors that are solved already."""
        solved = factors if factors is not None else (ledger or self.ledger).solve()
        set_lora_factors(
            lora_layers(self.model, self._names), self.adapter_name, cast(LoraConfig, self._adapter_config), solved
        )

    def _acts(self, ids: Sequence[int]) -> dict[str, list[float]] | None:
        if not self._config.gate:
            return None
        return opened_tokens(self, ids, [facts[0].subject for facts in self.ledger.subjects])

    def _saved_state(self) -> list[Restore]:
        layers = lora_layers(self.model, self._names)
        linears = {i: lora_linears(layer, self.adapter_name) for i, layer in layers.items()}
        before = {i: Factors(down.weight.data, up.weight.data) for i, (down, up) in linears.items()}
        undo = [*super()._saved_state(), lambda: self._set_factors(factors=before)]
        if self._config.gate:
            undo.append(self._keys().saved())
        return undo

    def state_dict(self) -> dict[str, Tensor]:
        """Return the LoRA's tensors by their names on the model, as PEFT saves them; keys are saved beside them."""
        return {name: tensor for name, tensor in super().state_dict().items() if ".lora_" in name}

    def _exporters(self) -> Mapping[str, Exporter]:
        return {name: partial(make, self) for name, make in EXPORTERS.items()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, covariance: bool = False) -> None:
        """Do as `Memory.save_pretrained`, and save `memory_config.json` and `ledger.safetensors`.

        Args:
            save_directory: A folder.
            covariance: Whether to save C₀ too, as `covariance.safetensors`: `load_memory` then takes it, and more is
                written with it. One that is there stays otherwise.

        Raises:
            ValueError: If `covariance=True`, but the memory has none. Nothing is saved then.
        """
        if not covariance:
            super().save_pretrained(save_directory)
            return
        if self.covariance is None:
            raise ValueError(
                "`covariance=True`, but nothing was written in this process, so the memory has no covariance: call "
                "`fit_covariance()` first, or leave it out."
            )
        with atomic_directory(save_directory) as staging:
            super().save_pretrained(staging)
            self.covariance.save(staging / Covariance.file)
            replace_memory(staging, Path(save_directory))

    def _write_files(self, folder: Path) -> None:
        super()._write_files(folder)
        if self._ledger is None:
            return
        text = json.dumps(self._config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
        weights = read_metadata(folder / WEIGHTS_FILE)[1]["sha256"]
        if self._config.gate:
            write_tensors(folder / KEYS_FILE, dict(self._keys().named_buffers()))
        write_tensors(folder / LEDGER_FILE, self.ledger.tensors(), {"edit": edit_digest(weights, self._config.items)})

    @classmethod
    def _config_of_adapter(cls, config_file: Path) -> MemitConfig | None:
        found = read_json(config_file)
        if not isinstance(found, dict) or found.get("peft_type") != "LORA":
            return None
        # What is not the default would change what the adapter does: it is no edit then.
        plain = LoraConfig(r=1).to_dict()
        given = {name: value for name, value in found.items() if name not in DESCRIBING}
        placed = {name: given.pop(name, None) for name in ("r", "lora_alpha", "target_modules", "fan_in_fan_out")}
        shapes = read_metadata(file_in(config_file.parent, WEIGHTS_FILE))[0]
        blocks = {re.search(r"\.(\d+)\.", name) for name in shapes}
        if (
            any(value not in (None, [], {}, plain.get(name)) for name, value in given.items())
            or placed["r"] != placed["lora_alpha"]
            or not blocks
            or None in blocks
        ):
            return None
        layers = sorted({int(block[1]) for block in blocks if block})
        return MemitConfig(layers=layers, base_model_name_or_path=found.get("base_model_name_or_path"))

    @classmethod
    def _read_files(cls, folder: Path, config: MemitConfig, decoder: Decoder) -> Any:
        if not (folder / SETTINGS_FILE).is_file():
            return None, read_adapter(folder, config, decoder), None, {}
        tensors = read_tensors(folder / LEDGER_FILE, config.tensor_shapes(decoder))
        edit = read_metadata(folder / LEDGER_FILE)[1].get("edit")
        size = decoder.hidden_size
        rank = max(min(len(tensors[f"shares.{min(config.widths(decoder))}"]), size), 1)
        check_adapter_config(folder / CONFIG_FILE, rank, config.projection_names(decoder).values())
        factors = read_tensors(folder / WEIGHTS_FILE, adapter_shapes(config, decoder, rank))
        if edit is not None and edit != edit_digest(tensors_digest(factors), config.items):
            raise ValueError(
                f"`{folder / LEDGER_FILE}` was saved with other facts or weights than `{SETTINGS_FILE}` and "
                f"`{WEIGHTS_FILE}` hold: one of them was changed by hand or is of another save. Save or download the "
                "memory again; to use changed weights without the ledger, load the folder with PEFT."
            )
        facts = [fact for fact in config.written_items() if isinstance(fact, Fact)]
        keys = read_tensors(folder / KEYS_FILE, config.key_shapes(decoder)) if config.gate else {}
        return (
            Ledger.from_tensors(facts, tensors, **config.ledger_settings),
            factors,
            read_covariance(folder, config, decoder),
            keys,
        )

    def _restore(self, contents: tuple[Ledger | None, dict[str, Tensor], Covariance | None, dict[str, Tensor]]) -> None:
        ledger, tensors, self.covariance, keys = contents
        for name, tensor in keys.items():
            self._keys()._buffers[name] = tensor.to(self._keys().keys.device)
        names = {layer: PEFT_KEY_PREFIX + name for layer, name in self._names.items()}
        factors = {
            layer: Factors(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
            for layer, name in names.items()
        }
        self._set_factors(factors=factors)
        self._ledger = ledger
