"""`write` of the residual memory: rows, keys, training, and what came of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

from memory_adapters.base_model.decoder import Decoder, execution_device, find_decoder
from memory_adapters.base_model.nonfinite import check_scores
from memory_adapters.base_model.partial_forward import logits_at
from memory_adapters.base_model.sampling import OTHER_SUBJECTS, PLAIN_SENTENCES, sample_text
from memory_adapters.base_model.seeding import seeded
from memory_adapters.base_model.tokens import pad_rows, score_rows, tokenize
from memory_adapters.card_examples import answers_to
from memory_adapters.files.atomic import scratch_folder
from memory_adapters.items import Fact, Item
from memory_adapters.keys.keys import StreamStatistics, gate_parameters, normalized, select_keys, uncovered
from memory_adapters.report import WriteReport
from memory_adapters.residual_mlp.gated_mlp import GatedMLP
from memory_adapters.residual_mlp.prompts import locality_turns
from memory_adapters.residual_mlp.stored_states import ReusedStates, row_states
from memory_adapters.residual_mlp.trainer import MemoryTrainer, activated, trainable_alone, training_arguments
from memory_adapters.training.checkpoints import checkpoint_to_resume, digest_of
from memory_adapters.training.dataset import Teacher, TurnDataset
from memory_adapters.training.rows import Row, TrainingTurn, build_turns, make_prefixes

if TYPE_CHECKING:
    from memory_adapters.residual_mlp.memory import ResidualMemory

__all__ = ["Writer"]

TEACHER_TOKENS = 64
CACHE_BYTES = 2 << 30


@dataclass
class Unrelated:
    """Rows of tokens that have nothing to do with what is written.

    Attributes:
        silent: What the memory must stay closed on.
        held_out: Text for measuring perplexity, not used otherwise.
    """

    silent: list[list[int]]
    held_out: list[list[int]]


class Writer:
    """One write into one memory.

    Args:
        memory: The memory; must have a tokenizer.
        items: What to write.
        unrelated: Texts that have nothing to do with the items; sampled from the model if None.
    """

    def __init__(self, memory: ResidualMemory, items: Sequence[Item], unrelated: Sequence[str] | None) -> None:
        self.memory = memory
        self.model: Any = memory.model
        self.tokenizer = memory.tokenizer
        self.config = memory.config
        self.items = items
        self.decoder: Decoder = find_decoder(self.model, self.config.layers_path)
        self.layers = [int(layer) for layer in self.config.depths]
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        self.max_length = min(context, self.config.max_length or context)
        # Items are tokenised once without prefixes first, so that bad ones are refused before any work.
        build_turns(items, self.tokenizer, prefixes=[], max_length=self.max_length)
        texts = list(unrelated) if unrelated is not None else self._sampled()
        self.prefixes = make_prefixes(texts, self.config.num_prefixes, self.config.seed)
        self.slots, self.notes = build_turns(items, self.tokenizer, prefixes=self.prefixes, max_length=self.max_length)
        self.unrelated = self._unrelated_rows(texts)

    def _sampled(self) -> list[str]:
        with self.memory.disabled():
            texts = sample_text(self.model, self.tokenizer, [""] * 24, num_tokens=64, seed=self.config.seed)
        return [text for text in texts if text.strip()]

    def _unrelated_rows(self, texts: Sequence[str]) -> Unrelated:
        rows = [tokenize(self.tokenizer, text)[: self.max_length] for text in texts]
        rows = [row for row in rows if len(row) > 1]
        if len(rows) < 2:
            raise ValueError(f"`unrelated` has {len(rows)} usable texts; give at least 2 of several words each.")
        held_out = rows[::4]
        others = list(PLAIN_SENTENCES)
        facts = [item for item in self.items if isinstance(item, Fact)]
        subjects = {fact.subject for fact in facts}
        names = [name for name in OTHER_SUBJECTS if name not in subjects]
        for i, fact in enumerate(facts):
            others.append(fact.prompt.replace(fact.subject, names[i % len(names)]))
        silent = [row for i, row in enumerate(rows) if i % 4]
        return Unrelated(silent + [tokenize(self.tokenizer, text)[: self.max_length] for text in others], held_out)

    def fit_keys(self) -> int:
        """Find the keys of the items at every block and add them; returns how many keys the block with most got."""
        config = self.config
        rows = [(slot, row) for slot in self.slots for row in slot.rows]
        last_words = self._last_words()
        with self.memory.disabled():
            unrelated = row_states(self.model, self.decoder, self.layers, self.unrelated.silent)
            written = row_states(self.model, self.decoder, self.layers, [row.input_ids for _, row in rows])
            words = row_states(self.model, self.decoder, self.layers, [ids for _, ids in last_words])
        fitted: list[tuple[Tensor, Tensor]] = []
        for position, layer in enumerate(self.layers):
            statistics = StreamStatistics.fit(torch.cat([states[position] for states in unrelated]))
            found = {index: [] for index in range(len(self.items))}  # type: dict[int, list[Tensor]]
            for (slot, row), states in zip(rows, written, strict=True):
                found[slot.item].append(normalized(states[position][row.key_positions]))
            word_states = {
                index: normalized(states[position][-1]) for (index, _), states in zip(last_words, words, strict=True)
            }
            keys, avoided = self._choose_keys(
                statistics, {i: torch.cat(parts) for i, parts in found.items()}, word_states
            )
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
        return [layer.memory_adapter_mlp[self.memory.adapter_name] for layer in self.memory.tuner_layers()]

    def _last_words(self) -> list[tuple[int, list[int]]]:
        """Item and tokens of a prefix that ends in the last word of each subject of several words."""
        found = []
        for index, item in enumerate(self.items):
            if isinstance(item, Fact) and len(item.subject.split()) > 1:
                word = item.subject.split()[-1]
                found += [
                    (index, tokenize(self.tokenizer, f"{prefix.rstrip('. ')} {word}")) for prefix in self.prefixes[:1]
                ]
        return found

    def _choose_keys(
        self, statistics: StreamStatistics, found: Mapping[int, Tensor], last_words: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Normalised keys (n, hidden_size) of all items, and what each must not open on (n, hidden_size).

        A fact's key is its subject's mean state, and each of its states that this key does not open; documents and
        questions get those of their tokens that are unlike unrelated text.
        """
        settings = {"threshold": self.config.key_threshold, "ramp": self.config.key_ramp}
        keys = [statistics.mean.new_zeros(0, self.decoder.hidden_size)]
        avoided = [keys[0]]
        for index, item in enumerate(self.items):
            if isinstance(item, Fact):
                mean = found[index].mean(0, keepdim=True)
                extra = found[index][uncovered(statistics, mean, found[index], **settings)]
                keys.append(torch.cat([mean, extra]))
                avoided.append(last_words.get(index, statistics.mean).expand_as(keys[-1]))
        rest = [found[index] for index, item in enumerate(self.items) if not isinstance(item, Fact)]
        if rest:
            tokens = torch.cat(rest)
            keys.append(tokens[select_keys(statistics, tokens, **settings)])
            avoided.append(statistics.mean.expand_as(keys[-1]))
        return torch.cat(keys), torch.cat(avoided)

    def train(
        self, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback], resume: bool | str
    ) -> list[float]:
        """Train on the slots; returns each epoch's mean loss."""
        slots = self.slots + (self._locality_slots() if self.config.locality_weight > 0 else [])
        rows = [row for slot in slots for row in slot.rows]
        ids = [row.input_ids for row in rows]
        reuse, states = self._stored_states(ids)
        teachers: list[Teacher | None] = [None] * len(rows)
        with self.memory.disabled():
            for i, kind in enumerate(slot.kind for slot in slots for _ in slot.rows):
                if kind == "locality" or self.config.distillation_weight > 0:
                    teachers[i] = self._teacher(rows[i])
        trainer = MemoryTrainer(
            self.memory,
            self.decoder,
            reuse,
            digest_of(ids),
            args=arguments,
            train_dataset=TurnDataset(slots, states, teachers),
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(resume, arguments.output_dir))
        return trainer.epoch_losses

    def _locality_slots(self) -> list[TrainingTurn]:
        subjects = [item.subject for item in self.items if isinstance(item, Fact)]
        prompts = subjects + [prefix + subject for prefix in self.prefixes[:1] for subject in subjects]
        with self.memory.disabled():
            said = (
                sample_text(self.model, self.tokenizer, prompts, num_tokens=12, seed=self.config.seed)
                if prompts
                else []
            )
        return locality_turns(self.items, self.tokenizer, said, self.unrelated.silent)

    def _stored_states(self, rows: Sequence[list[int]]) -> tuple[ReusedStates | None, list[Tensor] | None]:
        size = sum(map(len, rows)) * self.decoder.hidden_size * self.model.dtype.itemsize
        if size > CACHE_BYTES:
            return None, None
        reuse = ReusedStates(self.decoder, self.layers[0])
        return reuse, reuse.compute(self.model, rows)

    @torch.no_grad()
    def _teacher(self, row: Row) -> Teacher:
        """The base model's predictions at the labels of `row`, when it has read the row's context before."""
        context = row.context[: max(self.max_length - len(row.input_ids), 0)]
        inputs = pad_rows([context + row.input_ids], execution_device(self.decoder.embeddings))
        wanted = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
        wanted[0, len(context) + row.first_label - 1 : len(context) + len(row.input_ids) - 1] = True
        with logits_at(self.decoder, wanted):
            logits = self.model(**inputs, use_cache=False).logits[0].float()
        log_probs, ids = logits.log_softmax(-1).topk(min(TEACHER_TOKENS, logits.shape[-1]))
        return Teacher(ids.cpu(), log_probs.cpu())

    def scores(self) -> dict[str, float | None]:
        """Recall of facts and questions, token accuracy of documents, perplexity on held-out unrelated text."""
        plain = [slot for slot in self.slots if slot.plain]
        rows = [(slot.rows[0].input_ids, slot.rows[0].first_label) for slot in plain]
        rows += [(row, 1) for row in self.unrelated.held_out]
        rows += [(tokenize(self.tokenizer, sentence)[: self.max_length], 1) for sentence in PLAIN_SENTENCES[:8]]
        ids, first = [row for row, _ in rows], [first for _, first in rows]
        found = score_rows(self.model, self.decoder, ids, first)
        check_scores(found, self.model, self.decoder, ids)
        documents = torch.tensor([slot.kind == "document" for slot in plain])
        right, count = found.right[: len(plain)], found.count[: len(plain)]
        loss = {
            name: float(-found.log_prob[part].sum() / found.count[part].sum())
            for name, part in (("held out", slice(len(plain), -8)), ("english", slice(-8, None)))
        }
        return {
            "recall": None if documents.all() else (right == count)[~documents].float().mean().item(),
            "token_accuracy": (right[documents].sum() / count[documents].sum()).item() if documents.any() else None,
            "perplexity": math.exp(loss["held out"]),
            "english_loss": loss["english"],
        }


def write(
    memory: ResidualMemory,
    items: Sequence[Item],
    *,
    unrelated: Sequence[str] | None,
    overrides: Mapping[str, Any] | None,
    callbacks: Sequence[TrainerCallback],
    resume: bool | str,
) -> WriteReport:
    """Write `items`; see `ResidualMemory.write`."""
    start = time.perf_counter()
    writer = Writer(memory, items, unrelated)
    before = writer.scores()
    if before["english_loss"] > math.log(writer.decoder.vocab_size):  # type: ignore[operator]
        writer.notes.append(
            f"the base model finds plain English harder than random tokens (loss {before['english_loss']:.1f}): "
            "check that the tokenizer belongs to the model"
        )
    with scratch_folder() as folder, activated(memory), memory._rollback_on_error(), seeded(memory.config.seed):
        with trainable_alone(memory):
            if memory.config.has_keys:
                writer.fit_keys()
            arguments = training_arguments(memory, str(folder), overrides, len(writer.slots))
            losses = writer.train(arguments, callbacks, resume)
        after = writer.scores()
        answers = answers_to(memory, items)
        report = WriteReport(
            method=memory.config.method_name,
            num_items=dict(Counter(type(item).__name__ for item in items)),
            recall=after["recall"],
            recall_before=before["recall"],
            token_accuracy=after["token_accuracy"],
            token_accuracy_before=before["token_accuracy"],
            perplexity=after["perplexity"],
            perplexity_before=before["perplexity"],
            losses=losses,
            num_parameters=memory.num_parameters(),
            seconds=time.perf_counter() - start,
            notes=writer.notes,
            answers=answers,
        )
        memory.config.record(report)
    return report
