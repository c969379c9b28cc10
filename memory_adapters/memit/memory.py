"""A closed-form edit as a `Memory`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig
from torch import Tensor

from memory_adapters.base_model.decoder import Decoder, context_length
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.fingerprint import base_fingerprint, check_fingerprint, warn_if_unmarked
from memory_adapters.base_model.item_rows import ScoredRow
from memory_adapters.files.exports import Exporter
from memory_adapters.files.names import CARD_FILE, CONFIG_FILE, PEFT_KEY_PREFIX, SETTINGS_FILE, WEIGHTS_FILE
from memory_adapters.files.strict_json import read_json
from memory_adapters.files.tensors import read_metadata, read_tensors, tensors_digest, write_tensors
from memory_adapters.items import Fact, Item, Items, as_items
from memory_adapters.memit.config import MemitConfig
from memory_adapters.memit.corpus import Texts
from memory_adapters.memit.covariance import Covariance
from memory_adapters.memit.covariance_fitter import CovarianceFitter
from memory_adapters.memit.export import EXPORTERS
from memory_adapters.memit.layer import set_lora_factors
from memory_adapters.memit.ledger import Factors, Ledger, relation_of
from memory_adapters.memit.prompts import FactRow, bare_rows
from memory_adapters.memit.solvers import cost_of
from memory_adapters.memit.write import LedgerBuilder
from memory_adapters.memory import Memory, Outcome
from memory_adapters.peft_layers.layers import lora_layers, lora_linears
from memory_adapters.peft_layers.rollback import Restore, rollback_on_error
from memory_adapters.validation import shown

__all__ = ["MemitMemory"]

LEDGER_FILE = "ledger.safetensors"


class MemitMemory(Memory[MemitConfig]):
    """Solve facts into the MLP output projections of a few blocks: an ordinary LoRA adapter, and a ledger.

    `write` adds facts; a fact about the same subject and relation as an earlier one replaces it. The result does not
    depend on how facts are divided among writes, nor on their order.

    Options of `write`:
        covariance (`Covariance`, or a path or repository on the Hub): C₀. By default that of the last write, or else of
            text that the model samples.
        targets (`MemitMemory`): Another memory on the same blocks, whose z are taken for the facts that it holds: other
            solvers and settings of the solve can be tried without finding them again.

    Attributes:
        ledger: What was written, fact by fact.
        covariance: C₀ of the last write in this process; None before.
    """

    accepts = (Fact,)
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, LEDGER_FILE, CARD_FILE)

    _names: dict[int, str]  # of the edited projections, by block
    _widths: dict[int, int]  # their d_in
    ledger: Ledger
    covariance: Covariance | None = None

    def _attach(self, decoder: Decoder) -> None:
        self._names, self._widths = self._config.projection_names(decoder), self._config.widths(decoder)
        self.ledger = Ledger.empty(self._widths, decoder.hidden_size)
        self._set_factors(self.ledger)  # a LoRA of rank 1 has random factors until then

    @property
    def items(self) -> list[Item]:
        """The facts that are written, in the order of the ledger."""
        self._check_attached()
        return list(self.ledger.facts)

    def fit_covariance(self, texts: Texts | None = None, num_tokens: int | None = None, **settings: Any) -> Covariance:
        """Fit C₀ of the blocks that this memory edits, without the memory; it is kept for the writes to come.

        Args:
            texts: See `CovarianceFitter.fit`; None for text that the model samples from itself.
            num_tokens: Budget; by default the config's `covariance_tokens`.
            settings: Passed on to `CovarianceFitter.fit` or `.sample`.
        """
        with exclusive_use(self.model):
            self._check_writable()
            budget = num_tokens or self._config.covariance_tokens
            with self.disabled():
                fitter = CovarianceFitter(
                    self.model, self._require_tokenizer(), list(self._names), layers_path=self._config.layers_path
                )
                if texts is None:
                    fitter.sample(budget, seed=self._config.seed, **settings)
                else:
                    fitter.fit(texts, budget, **settings)
            self.covariance = fitter.covariance()
            return self.covariance

    def _check_items(self, items: Sequence[Item], **options: Any) -> tuple[Sequence[Item], list[str]]:
        facts, notes = without_repetitions(items)
        taken = {relation_of(fact) for fact in facts}
        replaced = sum(relation_of(fact) in taken for fact in self.ledger.facts)
        if replaced:
            notes.append(f"{replaced} fact{'s' * (replaced > 1)} about the same subject and relation replaced")
        return facts, notes

    def _rows(self, items: Sequence[Fact]) -> Sequence[ScoredRow]:
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
        used = self._covariance(covariance, progress)
        config = self._config
        costs = {
            layer: cost_of(
                config.solver,
                layer,
                used.shrunk(layer, config.shrinkage),
                regularization=config.regularization,
                null_space=config.null_space,
            )
            for layer in self._names
        }
        with self.disabled():
            builder = LedgerBuilder(self.model, self._require_tokenizer(), config)
            entries = builder.entries(items, rows, None if targets is None else targets.ledger, progress)
        ledger = self.ledger.plus(entries, costs)
        self._set_factors(ledger)
        self.ledger, self.covariance = ledger, used
        return Outcome(notes=[f"covariance of {used.num_tokens:,} tokens of {used.source}"])

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
        """Take facts out again: the edit is what it would be had they never been written. Needs no model pass.

        Raises:
            TypeError: If an item is not a `Fact`.
            ValueError: If a fact is not in the memory; nothing is forgotten then.
        """
        named = as_items(items, self.accepts)
        gone = set(named)
        with exclusive_use(self.model):
            self._register_again()
            written = set(self.ledger.facts)
            if missing := [fact for fact in named if fact not in written]:
                raise ValueError(f"`items` holds {missing[0]!r}, which is not written; see `items`.")
            with rollback_on_error(*self._saved_state()):
                ledger = self.ledger.subset([i for i, fact in enumerate(self.ledger.facts) if fact not in gone])
                self._set_factors(ledger)
                self.ledger = ledger
                self._set_items([])

    def _set_factors(self, ledger: Ledger | None = None, factors: Mapping[int, Factors] | None = None) -> None:
        """Let the LoRA adapter be the edit of a ledger, or of factors that are solved already."""
        solved = factors if factors is not None else (ledger or self.ledger).solve()
        set_lora_factors(
            lora_layers(self.model, self._names), self.adapter_name, cast(LoraConfig, self._adapter_config), solved
        )

    def _saved_state(self) -> list[Restore]:
        layers = lora_layers(self.model, self._names)
        linears = {i: lora_linears(layer, self.adapter_name) for i, layer in layers.items()}
        before = {i: Factors(down.weight.data, up.weight.data) for i, (down, up) in linears.items()}
        return [*super()._saved_state(), lambda: self._set_factors(factors=before)]

    def _exporters(self) -> Mapping[str, Exporter]:
        return {name: partial(make, self) for name, make in EXPORTERS.items()}

    def _write_files(self, folder: Path) -> None:
        super()._write_files(folder)
        text = json.dumps(self._config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
        weights = read_metadata(folder / WEIGHTS_FILE)[1]["sha256"]
        write_tensors(folder / LEDGER_FILE, self.ledger.tensors(), {"edit": _edit_digest(weights, self._config.items)})

    @classmethod
    def _read_files(cls, folder: Path, config: MemitConfig, decoder: Decoder) -> Any:
        tensors = read_tensors(folder / LEDGER_FILE, config.tensor_shapes(decoder))
        edit = read_metadata(folder / LEDGER_FILE)[1].get("edit")
        size = decoder.hidden_size
        rank = max(min(len(config.items), size), 1)
        names = config.projection_names(decoder)
        _check_adapter_config(folder / CONFIG_FILE, rank, names.values())
        shapes = {}
        for layer, width in config.widths(decoder).items():
            shapes[f"{PEFT_KEY_PREFIX}{names[layer]}.lora_A.weight"] = torch.Size((rank, width))
            shapes[f"{PEFT_KEY_PREFIX}{names[layer]}.lora_B.weight"] = torch.Size((size, rank))
        factors = read_tensors(folder / WEIGHTS_FILE, shapes)
        if edit is not None and edit != _edit_digest(tensors_digest(factors), config.items):
            raise ValueError(
                f"`{folder / LEDGER_FILE}` was saved with other facts or weights than `{SETTINGS_FILE}` and "
                f"`{WEIGHTS_FILE}` hold: one of them was changed by hand or is of another save. Save or download the "
                "memory again; to use changed weights without the ledger, load the folder with PEFT."
            )
        return Ledger.from_tensors(
            [fact for fact in config.written_items() if isinstance(fact, Fact)], tensors
        ), factors

    def _restore(self, contents: tuple[Ledger, dict[str, Tensor]]) -> None:
        ledger, tensors = contents
        names = {layer: PEFT_KEY_PREFIX + name for layer, name in self._names.items()}
        factors = {
            layer: Factors(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
            for layer, name in names.items()
        }
        self._set_factors(factors=factors)
        self.ledger = ledger


def _edit_digest(weights: str, facts: Sequence[Mapping[str, str]]) -> str:
    """Return the SHA-256 of what the ledger was saved with: the adapter's digest and the facts."""
    return hashlib.sha256(json.dumps([weights, facts], sort_keys=True).encode()).hexdigest()


def _check_adapter_config(path: Path, rank: int, names: Collection[str]) -> None:
    """Raise a `ValueError` unless plain PEFT would place the adapter where, and as strongly as, `load_memory` does."""
    found = read_json(path)
    found = found if isinstance(found, dict) else {}
    targets = found.get("target_modules")
    given = sorted(map(str, targets)) if isinstance(targets, list) else targets
    expected = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(names)}
    for field, value in expected.items():
        own = given if field == "target_modules" else found.get(field)
        if own != value:
            raise ValueError(
                f"`{path}` is not of the edit beside it: its `{field}` is {shown(own)}, the edit's {shown(value)}. "
                "Save or download the memory again."
            )


def without_repetitions(facts: Sequence[Any]) -> tuple[list[Fact], list[str]]:
    """Return facts without repetitions, and notes for the user.

    Raises:
        ValueError: If two state different targets for the same subject and relation; lists all that do.
    """
    targets: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        targets.setdefault(relation_of(fact), []).append(fact)
    if clashes := [group for group in targets.values() if len({fact.target for fact in group}) > 1]:
        listed = "; ".join(f"{g[0].prompt!r}: {', '.join(repr(f.target) for f in g)}" for g in clashes)
        raise ValueError(f"`items` contradict each other ({listed}): keep one target of each.")
    repeated = len(facts) - len(targets)
    return [group[0] for group in targets.values()], [f"{repeated} repeated fact(s) left out"] if repeated else []
