"""A closed-form edit as a `Memory`."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memory_adapters.base_model.decoder import Decoder, find_decoder
from memory_adapters.base_model.exclusive import alone, exclusive_use
from memory_adapters.base_model.fingerprint import base_fingerprint, check_fingerprint, warn_if_unmarked
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.nonfinite import check_scores
from memory_adapters.base_model.sampling import PLAIN_SENTENCES
from memory_adapters.base_model.tokens import score_rows, tokenize
from memory_adapters.card_examples import answers_to
from memory_adapters.files.model_card import CARD_FILE
from memory_adapters.files.names import CONFIG_FILE, PEFT_KEY_PREFIX, SETTINGS_FILE, WEIGHTS_FILE
from memory_adapters.files.strict_json import read_json
from memory_adapters.files.tensors import read_metadata, read_tensors, tensors_digest, write_tensors
from memory_adapters.items import Fact, as_items
from memory_adapters.memit.config import MemitConfig
from memory_adapters.memit.covariance import Covariance
from memory_adapters.memit.covariance_fitter import CovarianceFitter
from memory_adapters.memit.export import EXPORTERS
from memory_adapters.memit.layer import set_lora_factors
from memory_adapters.memit.ledger import Factors, Ledger, relation_of
from memory_adapters.memit.projection import mlp_projection
from memory_adapters.memit.prompts import Context, fact_rows
from memory_adapters.memit.solvers import cost_of
from memory_adapters.memit.write import LedgerBuilder
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.layers import lora_layers, remove_lora
from memory_adapters.peft_layers.virtual_tokens import without_slots
from memory_adapters.report import WriteReport
from memory_adapters.validation import shown

__all__ = ["MemitMemory"]

LEDGER_FILE = "ledger.safetensors"


class MemitMemory(Memory):
    """Facts solved into the MLP output projections of a few blocks: an ordinary LoRA adapter, and a ledger.

    Attributes:
        ledger: What was written, fact by fact.
        covariance: C₀ of the last write in this process; None before.
    """

    config: MemitConfig
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, LEDGER_FILE, CARD_FILE)
    exporters = EXPORTERS

    def __init__(self, model: nn.Module, adapter_name: str, config: MemitConfig, tokenizer: Any = None) -> None:
        super().__init__(model, adapter_name, config, tokenizer)
        decoder = find_decoder(model, config.layers_path)
        config.layers = config.resolved(decoder)
        self._names = {layer: mlp_projection(decoder, layer).name for layer in config.resolved(decoder)}
        self.ledger = Ledger.empty(config.widths(decoder), decoder.hidden_size)
        self.covariance: Covariance | None = None
        self._place(self.ledger.solve())

    @property
    def facts(self) -> list[Fact]:
        """What is written."""
        return list(self.ledger.facts)

    @alone
    def fit_covariance(self, texts: Any = None, num_tokens: int | None = None, **settings: Any) -> Covariance:
        """C₀ of the blocks that this memory edits, without the memory; kept for the writes to come.

        Args:
            texts: See `CovarianceFitter.fit`; None for text that the model samples from itself.
            num_tokens: Budget; by default the config's `covariance_tokens`.
            settings: Passed on to `CovarianceFitter.fit` or `.sample`.
        """
        self._check_writable()
        budget = num_tokens or self.config.covariance_tokens
        with self.disabled():
            fitter = CovarianceFitter(
                self.model, self.tokenizer, list(self._names), layers_path=self.config.layers_path
            )
            if texts is None:
                fitter.sample(budget, seed=self.config.seed, **settings)
            else:
                fitter.fit(texts, budget, **settings)
        self.covariance = fitter.covariance()
        return self.covariance

    @alone
    @without_slots
    def write(
        self,
        items: Any,
        *,
        covariance: Covariance | str | None = None,
        targets: MemitMemory | None = None,
        progress: bool = True,
    ) -> WriteReport:
        """Add facts. Earlier ones stay; a fact about the same subject and relation is replaced.

        The result does not depend on how facts are divided among writes, nor on their order. Slots of other memories
        are not read meanwhile. If it fails or is interrupted, the memory is what it was before.

        Args:
            items: One `Fact` or many.
            covariance: C₀, or where it was saved (a file, or a repository on the Hub). By default that of the last
                write, or else of text sampled from the model.
            targets: Another memory on the same blocks, whose z are taken for the facts that it holds: other solvers and
                settings of the solve can be tried without finding them again.
            progress: Show bars.

        Raises:
            TypeError: If an item is not a `Fact`.
            ValueError: If facts contradict each other, one does not fit in the model's context, there is no tokenizer,
                or the covariance is singular or of another model.
        """
        start = time.perf_counter()
        facts, notes = consistent(as_items(items, (Fact,)))
        self._check_writable()
        given = Covariance.load(covariance) if isinstance(covariance, str) else covariance
        if given is not None:
            warn_if_unmarked(given.base_fingerprint, "`covariance`")
            check_fingerprint(given.base_fingerprint, base_fingerprint(self.model, self.config.layers_path))
            given.check_widths(self.config.widths(find_decoder(self.model, self.config.layers_path)))
        maker = LedgerBuilder(self.model, self.tokenizer, self.config)
        with self.disabled(), evaluating(self.model):
            maker.check(facts)
            before = self._scores(facts)
            used = given or self.covariance or self.fit_covariance(progress=progress)
            costs = {
                layer: cost_of(layer, used.shrunk(layer, self.config.shrinkage), self.config) for layer in self._names
            }
            entries = maker.entries(facts, None if targets is None else targets.ledger, progress)
        ledger = self.ledger.plus(entries, costs)
        replaced = len(self.ledger.facts) + len(facts) - len(ledger.facts)
        if replaced:
            notes.append(f"{replaced} fact{'s' * (replaced > 1)} about the same subject and relation replaced")
        with self._rollback_on_error():
            self._place(ledger.solve())
            with evaluating(self.model):
                after = self._scores(facts)
            answers = answers_to(self, facts)
            self.ledger, self.covariance = ledger, used
            report = WriteReport(
                method=self.config.method_name,
                num_items={"Fact": len(facts)},
                recall=after[0],
                recall_before=before[0],
                perplexity=after[1],
                perplexity_before=before[1],
                num_parameters=self.num_parameters(),
                seconds=time.perf_counter() - start,
                notes=[*notes, f"covariance of {used.num_tokens:,} tokens of {used.source}"],
                answers=answers,
            )
            self.config.record(report)
        return report

    def forget(self, items: Any) -> None:
        """Take facts out again: the edit is what it would be had they never been written. Needs no model pass.

        Raises:
            TypeError: If an item is not a `Fact`.
            ValueError: If a fact is not in the memory; nothing is forgotten then.
        """
        self._check_attached()
        gone = set(as_items(items, (Fact,)))
        with exclusive_use(self.model), self._rollback_on_error():
            if missing := [fact for fact in gone if fact not in self.ledger.facts]:
                raise ValueError(f"`items` holds {missing[0]!r}, which is not written; see `facts`.")
            ledger = self.ledger.subset([i for i, fact in enumerate(self.ledger.facts) if fact not in gone])
            prompts = {fact.prompt for fact in self.ledger.facts if fact in gone}
            self._place(ledger.solve())
            self.ledger = ledger
            self.config.answers = [answer for answer in self.config.answers if answer["prompt"] not in prompts]

    def _place(self, factors: dict[int, Factors]) -> None:
        set_lora_factors(lora_layers(self.model, self._names), self.adapter_name, self._adapter_config, factors)

    def _scores(self, facts: Sequence[Fact]) -> tuple[float, float]:
        """Share of facts that greedy decoding gives, and perplexity on plain sentences."""
        rows = [row for row in fact_rows(facts, [Context()], self.tokenizer, 1 << 30) if row.context == 0]
        plain = [tokenize(self.tokenizer, sentence) for sentence in PLAIN_SENTENCES]
        decoder = find_decoder(self.model, self.config.layers_path)
        first = [row.first_label for row in rows] + [1] * len(plain)
        every = [row.ids for row in rows] + plain
        found = score_rows(self.model, decoder, every, first)
        check_scores(found, self.model, decoder, every)
        right = (found.right == found.count)[: len(rows)].float().mean()
        loss = -found.log_prob[len(rows) :].sum() / found.count[len(rows) :].sum()
        return float(right), math.exp(loss)

    def _detach(self) -> None:
        self.active = False  # so that PEFT does not activate another adapter in its place
        remove_lora(self.model, self._names, self.adapter_name)

    def _write_files(self, folder: Path) -> None:
        super()._write_files(folder)
        facts = [{"prompt": f.prompt, "subject": f.subject, "target": f.target} for f in self.ledger.facts]
        settings = {**self.config.to_dict(), "facts": facts}
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
        weights = read_metadata(folder / WEIGHTS_FILE)[1]["sha256"]
        write_tensors(folder / LEDGER_FILE, self.ledger.tensors(), {"edit": _edit_digest(weights, facts)})

    @classmethod
    def _read_files(cls, folder: Path, config: MemitConfig, decoder: Decoder) -> Any:
        facts = [Fact(**fact) for fact in config.facts]
        ledger = read_tensors(folder / LEDGER_FILE, config.tensor_shapes(decoder))
        edit = read_metadata(folder / LEDGER_FILE)[1].get("edit")
        size = decoder.hidden_size
        rank = max(min(len(facts), size), 1)
        shapes = {}
        names = {layer: mlp_projection(decoder, layer).name for layer in config.resolved(decoder)}
        _check_adapter_config(folder / CONFIG_FILE, rank, names.values())
        for layer, width in config.widths(decoder).items():
            name = PEFT_KEY_PREFIX + names[layer]
            shapes[f"{name}.lora_A.weight"] = torch.Size((rank, width))
            shapes[f"{name}.lora_B.weight"] = torch.Size((size, rank))
        factors = read_tensors(folder / WEIGHTS_FILE, shapes)
        if edit is not None and edit != _edit_digest(tensors_digest(factors), config.facts):
            raise ValueError(
                f"`{folder / LEDGER_FILE}` was saved with other facts or weights than `{SETTINGS_FILE}` and "
                f"`{WEIGHTS_FILE}` hold: one of them was changed by hand or is of another save. Save or download the "
                "memory again; to use changed weights without the ledger, load the folder with PEFT."
            )
        return Ledger.from_tensors(facts, ledger), factors

    def _restore(self, contents: tuple[Ledger, dict[str, Tensor]]) -> None:
        ledger, tensors = contents
        names = {layer: PEFT_KEY_PREFIX + name for layer, name in self._names.items()}
        self._place(
            {
                i: Factors(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
                for i, name in names.items()
            }
        )
        self.ledger = ledger


def _edit_digest(weights: str, facts: Sequence[Mapping[str, str]]) -> str:
    """What the ledger was saved with: SHA-256 of the adapter's digest and the facts."""
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


def consistent(facts: Sequence[Any]) -> tuple[list[Fact], list[str]]:
    """Facts without repetitions, and notes for the user.

    Raises:
        ValueError: If two say different things of the same subject and relation; lists all that do.
    """
    said: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        said.setdefault(relation_of(fact), []).append(fact)
    if clashes := [group for group in said.values() if len({fact.target for fact in group}) > 1]:
        listed = "; ".join(f"{g[0].prompt!r}: {', '.join(repr(f.target) for f in g)}" for g in clashes)
        raise ValueError(f"`items` contradict each other ({listed}): keep one target of each.")
    repeated = len(facts) - len(said)
    return [group[0] for group in said.values()], [f"{repeated} repeated fact(s) left out"] if repeated else []
