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
from memory_adapters.base_model.sampling import PLAIN_QUESTIONS, PLAIN_SENTENCES, sample_text
from memory_adapters.base_model.seeding import seeded
from memory_adapters.base_model.tokens import pad_rows
from memory_adapters.files.atomic import scratch_folder
from memory_adapters.items import Fact, Item
from memory_adapters.keys.fitting import fit_keys, unrelated_rows
from memory_adapters.keys.things import asked_about, terms_of, things_of, words_in
from memory_adapters.memory import Memory, Outcome
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.gated_mlp import GatedMLP
from memory_adapters.residual_mlp.layer import residual_layers
from memory_adapters.residual_mlp.prompts import locality_turns
from memory_adapters.residual_mlp.trainer import MemoryTrainer, parameters_of, training_arguments
from memory_adapters.training.checkpoints import checkpoint_to_resume, digest_of
from memory_adapters.training.dataset import Teacher, TurnDataset
from memory_adapters.training.rows import TrainingTurn, build_turns, make_prefixes
from memory_adapters.training.stored_states import ReusedStates
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
        about: What each question is about.
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
        self.about = asked_about(things_of([*earlier, *items], self.tokenizer))
        common = words_in([*texts, *PLAIN_SENTENCES, *PLAIN_QUESTIONS])
        words = {item: thing.spellings or terms_of(thing, common) for item, thing in self.about.items()}
        settings: dict[str, Any] = dict(prefixes=self.prefixes, max_length=self.max_length, words=words)
        self.turns, self.notes = build_turns(items, self.tokenizer, **settings)
        self.rehearsed, _ = build_turns(earlier, self.tokenizer, **settings)
        self.unrelated = unrelated_rows(items, self.tokenizer, texts, self.max_length, chat=True)

    def _sampled(self) -> list[str]:
        with self.memory.disabled():
            texts = sample_text(self.model, self.tokenizer, [""] * 24, num_tokens=64, seed=self.config.seed)
        return [text for text in texts if text.strip()]

    def fit_keys(self) -> int:
        """Find the keys of the items at every block and add them; returns how many keys the block with most got."""
        config = self.config
        with self.memory.disabled():
            fitted, notes = fit_keys(
                self.model,
                self.decoder,
                self.layers,
                # A question is found by the name in it, as a fact by its subject.
                [self.about[item].named_item if item in self.about else item for item in self.items],
                [(turn.item, row) for turn in self.turns for row in turn.rows],
                self.tokenizer,
                prefix=next(iter(self.prefixes), ""),
                unrelated=self.unrelated,
                threshold=config.key_threshold,
                ramp=config.key_ramp,
            )
        self.notes += notes
        added = max(len(keys.bias) for keys in fitted)
        for module, keys in zip(self._modules(), fitted, strict=True):
            spare = added - len(keys.bias)  # keys that never open, so that every block has as many
            module.add_keys(F.pad(keys.weights, (0, 0, 0, spare)), F.pad(keys.bias, (0, spare), value=-1.0))
        config.num_keys += added
        return added

    def _modules(self) -> list[GatedMLP]:
        return [layer.mlp(self.memory.adapter_name) for layer in residual_layers(self.memory)]

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
