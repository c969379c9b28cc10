"""Write a gated LoRA: find keys, train the LoRA behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from memory_adapters.base_model.decoder import Decoder, context_length, find_decoder
from memory_adapters.base_model.item_rows import IGNORED
from memory_adapters.base_model.partial_forward import logits_at
from memory_adapters.base_model.sampling import sample_text
from memory_adapters.base_model.seeding import seeded
from memory_adapters.files.atomic import scratch_folder
from memory_adapters.gated_lora.config import GatedLoraConfig
from memory_adapters.gated_lora.layer import lora_parameters, reader_of
from memory_adapters.gated_lora.prompts import build_turns, key_rows, spellings
from memory_adapters.items import Item
from memory_adapters.keys.fitting import fit_keys, unrelated_rows
from memory_adapters.memory import Memory, Outcome
from memory_adapters.training.checkpoints import digest_of
from memory_adapters.training.dataset import TurnDataset, collate
from memory_adapters.training.rows import make_prefixes
from memory_adapters.training.stored_states import ReusedStates
from memory_adapters.training.trainer import AdapterTrainer, default_arguments, only_trainable

__all__ = ["longest_row", "write"]

RAMP = 0.1  # scale of a gate's slope, which is only read above or below 0
CACHE_BYTES = 2 << 30


class LoraTrainer(AdapterTrainer):
    """Train the LoRA on the labels of its rows, from the states below it."""

    def __init__(
        self,
        memory: Memory[GatedLoraConfig],
        decoder: Decoder,
        reuse: ReusedStates | None,
        data_digest: str,
        **kwargs: Any,
    ) -> None:
        self.memory, self.decoder, self.reuse = memory, decoder, reuse
        super().__init__(
            memory.model,
            adapter=memory,
            data_digest=data_digest,
            target_loss=memory.config.target_loss,
            data_collator=collate,
            **kwargs,
        )

    def trained_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return the LoRA's parameters."""
        return lora_parameters(self.memory).items()

    def batch_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the next-token loss at the labels."""
        targets = inputs["labels"][:, 1:]
        wanted = F.pad(targets != IGNORED, (0, 1))
        with ExitStack() as stack:
            stack.enter_context(logits_at(self.decoder, wanted))
            if self.reuse is not None:
                stack.enter_context(self.reuse.resume(inputs["states"]))
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        loss = F.cross_entropy(output.logits[0].float(), targets[wanted[:, :-1]])
        self.step_losses.append(loss.detach())
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss is NaN or infinite in step {self.state.global_step}: lower `learning_rate`, or use the "
                "model in bfloat16 or float32."
            )
        return loss


def longest_row(memory: Memory[GatedLoraConfig]) -> int:
    """Return how many tokens a training row may have."""
    limit = context_length(memory.model)
    return min(limit, memory.config.max_length or limit)


def write(
    memory: Memory[GatedLoraConfig],
    items: Sequence[Item],
    earlier: Sequence[Item],
    *,
    unrelated: Sequence[str] | None,
    training_args: Mapping[str, Any],
    callbacks: Sequence[TrainerCallback],
) -> Outcome:
    """Find the items' keys, and train the LoRA on them and on those of earlier writes."""
    config, model, tokenizer = memory.config, memory.model, memory._require_tokenizer()
    decoder = find_decoder(model, config.layers_path)
    with scratch_folder() as folder, seeded(config.seed), only_trainable(model, lora_parameters(memory).values()):
        longest = longest_row(memory)
        with memory.disabled():
            texts = list(unrelated) if unrelated is not None else _sampled(memory)
            prefixes = make_prefixes(texts, config.num_prefixes, config.seed)
            known = [*earlier, *items]
            settings: dict[str, Any] = dict(prefixes=prefixes, max_length=longest, rephrase=config.phrasings)
            turns, notes = build_turns(items, known, tokenizer, **settings)
            rehearsed, _ = build_turns(earlier, known, tokenizer, **settings)
            rows = [(turn.item, row) for turn in turns for row in turn.rows]
            (keys,), own_notes = fit_keys(
                model,
                decoder,
                [config.block],
                items,
                [*rows, *key_rows(items, tokenizer)],
                tokenizer,
                prefix=next(iter(prefixes), ""),
                unrelated=unrelated_rows(items, tokenizer, texts, longest, chat=True),
                threshold=config.key_threshold,
                ramp=RAMP,
            )
        key_set = reader_of(memory).key_set(memory.adapter_name)
        key_set.add(keys, [spellings(item, tokenizer) for item in items])
        config.key_owners, config.names = list(key_set.owners), list(key_set.names)
        turns += rehearsed
        ids = [row.input_ids for turn in turns for row in turn.rows]
        reuse, states = None, None
        if sum(map(len, ids)) * decoder.hidden_size * model.dtype.itemsize <= CACHE_BYTES:
            reuse = ReusedStates(decoder, config.block)
            states = reuse.compute(model, ids)
        arguments = default_arguments(
            model,
            dict(
                output_dir=str(folder),
                per_device_train_batch_size=config.batch_size,
                num_train_epochs=config.num_train_epochs,
                learning_rate=config.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=config.warmup_steps,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
                seed=config.seed,
                **training_args,
            ),
        )
        dataset = TurnDataset(turns, states, [None] * len(ids))
        trainer = LoraTrainer(
            memory, decoder, reuse, digest_of(ids), args=arguments, train_dataset=dataset, callbacks=list(callbacks)
        )
        trainer.train()
        return Outcome(losses=trainer.epoch_losses, notes=[*notes, *own_notes])


def _sampled(memory: Memory[GatedLoraConfig]) -> list[str]:
    texts = sample_text(memory.model, memory._require_tokenizer(), [""] * 24, num_tokens=64, seed=memory.config.seed)
    return [text for text in texts if text.strip()]
