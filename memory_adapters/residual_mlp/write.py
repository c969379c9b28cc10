"""Write a residual memory: find keys, train the MLPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from memory_adapters.base_model.decoder import Decoder, context_length, execution_device, find_decoder
from memory_adapters.base_model.item_rows import Row
from memory_adapters.base_model.partial_forward import logits_at
from memory_adapters.base_model.sampling import OTHER_SUBJECTS, PLAIN_SENTENCES, sample_text
from memory_adapters.base_model.seeding import seeded
from memory_adapters.base_model.tokens import pad_rows, tokenize
from memory_adapters.files.atomic import scratch_folder
from memory_adapters.items import Document, Fact, Item
from memory_adapters.keys.keys import StreamStatistics, covering_keys, gate_parameters, normalized, select_keys
from memory_adapters.memory import Memory, Outcome
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.gated_mlp import GatedMLP
from memory_adapters.residual_mlp.layer import residual_layers
from memory_adapters.residual_mlp.prompts import locality_turns
from memory_adapters.residual_mlp.stored_states import ReusedStates, row_states
from memory_adapters.residual_mlp.trainer import MemoryTrainer, parameters_of, training_arguments
from memory_adapters.training.checkpoints import checkpoint_to_resume, digest_of
from memory_adapters.training.dataset import Teacher, TurnDataset
from memory_adapters.training.rows import TrainingTurn, build_turns, make_prefixes
from memory_adapters.training.trainer import only_trainable

__all__ = ["Writer", "longest_row", "write"]

TEACHER_TOKENS = 64
CACHE_BYTES = 2 << 30


class Writer:
    """Run one write into one residual memory.

    Args:
        memory: The memory; must have a tokenizer.
        items: What to write.
        unrelated: Texts that have nothing to do with the items; sampled from the model if None.
        earlier: Items of earlier writes, which are trained again: else they would fade.

    Attributes:
        turns: The items' rows, as training goes through them.
        rehearsed: Those of the earlier items.
        unrelated: Rows of tokens on which the memory must stay closed.
        notes: What the user should know.
    """

    def __init__(
        self,
        memory: Memory[MemoryAdapterConfig],
        items: Sequence[Item],
        unrelated: Sequence[str] | None,
        earlier: Sequence[Item] = (),
    ) -> None:
        self.memory = memory
        self.model = memory.model
        self.tokenizer = memory._require_tokenizer()
        self.config = memory.config
        self.items = items
        self.decoder: Decoder = find_decoder(self.model, self.config.layers_path)
        self.layers = [int(layer) for layer in self.config.depths]
        self.max_length = longest_row(self.model, self.config)
        texts = list(unrelated) if unrelated is not None else self._sampled()
        self.prefixes = make_prefixes(texts, self.config.num_prefixes, self.config.seed)
        settings: dict[str, Any] = dict(prefixes=self.prefixes, max_length=self.max_length)
        self.turns, self.notes = build_turns(items, self.tokenizer, **settings)
        self.rehearsed, _ = build_turns(earlier, self.tokenizer, **settings)
        self.unrelated = self._unrelated_rows(texts)

    def _sampled(self) -> list[str]:
        with self.memory.disabled():
            texts = sample_text(self.model, self.tokenizer, [""] * 24, num_tokens=64, seed=self.config.seed)
        return [text for text in texts if text.strip()]

    def _unrelated_rows(self, texts: Sequence[str]) -> list[list[int]]:
        rows = [tokenize(self.tokenizer, text)[: self.max_length] for text in texts]
        rows = [row for row in rows if len(row) > 1]
        if len(rows) < 2:
            raise ValueError(f"`unrelated` has {len(rows)} usable texts; give at least 2 of several words each.")
        facts = [item for item in self.items if isinstance(item, Fact)]
        names = [name for name in OTHER_SUBJECTS if name not in {fact.subject for fact in facts}]
        others = [fact.about(names[i % len(names)]) for i, fact in enumerate(facts)]
        return rows + [tokenize(self.tokenizer, text)[: self.max_length] for text in (*PLAIN_SENTENCES, *others)]

    def fit_keys(self) -> int:
        """Find the keys of the items at every block and add them; returns how many keys the block with most got."""
        config = self.config
        rows = [(turn, row) for turn in self.turns for row in turn.rows]
        last_words = self._last_words()
        with self.memory.disabled():
            unrelated = row_states(self.model, self.decoder, self.layers, self.unrelated)
            written = row_states(self.model, self.decoder, self.layers, [row.input_ids for _, row in rows])
            words = row_states(self.model, self.decoder, self.layers, [ids for _, ids in last_words])
        fitted: list[tuple[Tensor, Tensor]] = []
        for position, layer in enumerate(self.layers):
            statistics = StreamStatistics.fit(torch.cat([states[position] for states in unrelated]))
            found: list[list[Tensor]] = [[] for _ in self.items]
            named: list[list[Tensor]] = [[] for _ in self.items]  # with the subject's own name alone
            for (turn, row), states in zip(rows, written, strict=True):
                own = normalized(states[position][row.key_positions])
                found[turn.item].append(own)
                if not row.by_other_name:
                    named[turn.item].append(own)
            word_states = {
                index: normalized(states[position][-1]) for (index, _), states in zip(last_words, words, strict=True)
            }
            means = [torch.cat(parts).mean(0, keepdim=True) for parts in named]
            keys, avoided = self._choose_keys(statistics, list(map(torch.cat, found)), means, word_states, layer)
            weights, bias, leaky = gate_parameters(
                statistics, keys, avoided, threshold=config.key_threshold, ramp=config.key_ramp
            )
            if leaks := int(leaky.sum()):
                self.notes.append(f"{leaks} of {len(keys)} keys also open on some unrelated text at block {layer}")
            fitted.append((weights, bias))
        added = max(len(bias) for _, bias in fitted)
        for module, (weights, bias) in zip(self._modules(), fitted, strict=True):
            spare = added - len(bias)  # keys that never open, so that every block has as many
            module.add_keys(F.pad(weights, (0, 0, 0, spare)), F.pad(bias, (0, spare), value=-1.0))
        config.num_keys += added
        return added

    def _modules(self) -> list[GatedMLP]:
        return [layer.mlp(self.memory.adapter_name) for layer in residual_layers(self.memory)]

    def _last_words(self) -> list[tuple[int, list[int]]]:
        """Return, for each subject of several words, its item and the tokens of a prefix that ends in its last word."""
        found = []
        for index, item in enumerate(self.items):
            if isinstance(item, Fact) and len(item.subject.split()) > 1:
                word = item.subject.split()[-1]
                found += [
                    (index, tokenize(self.tokenizer, f"{prefix.rstrip('. ')} {word}")) for prefix in self.prefixes[:1]
                ]
        return found

    def _choose_keys(
        self,
        statistics: StreamStatistics,
        found: Sequence[Tensor],
        means: Sequence[Tensor],
        last_words: Mapping[int, Tensor],
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """Return normalised keys (n, hidden_size) of all items, and what each must not open on (n, hidden_size).

        A fact's key is its subject's mean state, and each of its states that the keys before do not open; documents and
        questions get those of their tokens that are unlike unrelated text.
        """
        settings = {"threshold": self.config.key_threshold, "ramp": self.config.key_ramp}
        keys = [statistics.mean.new_zeros(0, self.decoder.hidden_size)]
        avoided = [keys[0]]
        shut: list[int] = []
        for index, item in enumerate(self.items):
            if isinstance(item, Fact):
                last_word = last_words.get(index, statistics.mean)
                own, closed = covering_keys(statistics, means[index], found[index], last_word, **settings)
                keys.append(own)
                avoided.append(last_word.expand_as(own))
                shut += [index] if closed.any() else []
        rest = [index for index, item in enumerate(self.items) if not isinstance(item, Fact)]
        if rest:
            tokens = torch.cat([found[index] for index in rest])
            keys.append(tokens[select_keys(statistics, tokens, **settings)])
            avoided.append(statistics.mean.expand_as(keys[-1]))
            directions = statistics.directions(keys[-1])
            for index in rest:
                near = (found[index] - statistics.mean) @ directions.T
                shut += [index] if not len(directions) or near.max() < settings["threshold"] else []
        if shut and self.config.token_gate == "keys":
            item = self.items[shut[0]]
            what = item.text[:40] if isinstance(item, Document) else item.prompt
            self.notes.append(
                f"at block {layer} the memory stays shut, or opens in part, in some text of {len(shut)} of "
                f"{len(self.items)} items (first: {what!r}): their states there are like those of unrelated text"
            )
        return torch.cat(keys), torch.cat(avoided)

    def train(
        self, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback], resume: bool | str
    ) -> list[float]:
        """Train on the turns; returns each epoch's mean loss."""
        turns = self.turns + self.rehearsed + (self._locality_turns() if self.config.locality_weight > 0 else [])
        rows = [row for turn in turns for row in turn.rows]
        ids = [row.input_ids for row in rows]
        reuse, states = self._stored_states(ids)
        teachers: list[Teacher | None] = [None] * len(rows)
        with self.memory.disabled():
            for i, kind in enumerate(turn.kind for turn in turns for _ in turn.rows):
                if kind == "locality" or self.config.distillation_weight > 0:
                    teachers[i] = self._teacher(rows[i])
        trainer = MemoryTrainer(
            self.memory,
            self.decoder,
            reuse,
            digest_of(ids),
            args=arguments,
            train_dataset=TurnDataset(turns, states, teachers),
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(resume, arguments.output_dir))
        return trainer.epoch_losses

    def _locality_turns(self) -> list[TrainingTurn]:
        subjects = [item.subject for item in self.items if isinstance(item, Fact)]
        prompts = subjects + [prefix + subject for prefix in self.prefixes[:1] for subject in subjects]
        with self.memory.disabled():
            continuations = (
                sample_text(self.model, self.tokenizer, prompts, num_tokens=12, seed=self.config.seed)
                if prompts
                else []
            )
        return locality_turns(self.items, self.tokenizer, continuations, self.unrelated)

    def _stored_states(self, rows: Sequence[list[int]]) -> tuple[ReusedStates | None, list[Tensor] | None]:
        size = sum(map(len, rows)) * self.decoder.hidden_size * self.model.dtype.itemsize
        if size > CACHE_BYTES:
            return None, None
        reuse = ReusedStates(self.decoder, self.layers[0])
        return reuse, reuse.compute(self.model, rows)

    @torch.no_grad()
    def _teacher(self, row: Row) -> Teacher:
        """Return the base model's predictions at the labels of `row`, after reading the row's context."""
        context = row.context[: max(self.max_length - len(row.input_ids), 0)]
        inputs = pad_rows([context + row.input_ids], execution_device(self.decoder.embeddings))
        wanted = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
        wanted[0, len(context) + row.first_label - 1 : len(context) + len(row.input_ids) - 1] = True
        with logits_at(self.decoder, wanted):
            logits = self.model(**inputs, use_cache=False).logits[0].float()
        log_probs, ids = logits.log_softmax(-1).topk(min(TEACHER_TOKENS, logits.shape[-1]))
        return Teacher(ids.cpu(), log_probs.cpu())


def longest_row(model: PreTrainedModel, config: MemoryAdapterConfig) -> int:
    """Return how many tokens a training row may have."""
    return min(context_length(model), config.max_length or context_length(model))


def write(
    memory: Memory[MemoryAdapterConfig],
    items: Sequence[Item],
    *,
    earlier: Sequence[Item],
    unrelated: Sequence[str] | None,
    training_args: Mapping[str, Any],
    callbacks: Sequence[TrainerCallback],
    resume: bool | str,
) -> Outcome:
    """Find the items' keys and train the memory on them, and on those of earlier writes."""
    trained = parameters_of(memory).values()
    with scratch_folder() as folder, seeded(memory.config.seed), only_trainable(memory.model, trained):
        writer = Writer(memory, items, unrelated, earlier)
        num_turns = len(writer.turns) + len(writer.rehearsed)
        arguments = training_arguments(memory, str(folder), training_args, num_turns)
        if memory.config.has_keys:
            writer.fit_keys()
        return Outcome(losses=writer.train(arguments, callbacks, resume), notes=writer.notes)
