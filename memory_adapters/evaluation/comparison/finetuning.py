"""Train parameters of a model on items with `transformers.Trainer`: what memories are compared with."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.item_rows import IGNORED
from memory_adapters.base_model.partial_forward import logits_at
from memory_adapters.base_model.sampling import PLAIN_SENTENCES, sample_text
from memory_adapters.base_model.seeding import seeded
from memory_adapters.items import Document, Item
from memory_adapters.training.dataset import TurnDataset, collate
from memory_adapters.training.rows import build_turns, make_prefixes
from memory_adapters.training.trainer import AdapterTrainer, check_training_options, default_arguments, only_trainable

__all__ = ["Recipe", "train"]

REHEARSED_TOKENS = 64


@dataclass(frozen=True)
class Recipe:
    """Set how parameters are trained.

    Attributes:
        learning_rate: AdamW's peak (cosine schedule).
        num_train_epochs: Most passes over the items.
        min_steps: Small sets get more passes, up to this many steps.
        target_loss: Training ends after an epoch whose mean loss is below this; 0 to make all passes.
        batch_size: Rows a step.
        warmup_steps: Steps of linear warm-up.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: Gradient clipping.
        num_prefixes: Prefixes, from plain sentences, behind which each fact is trained beside its bare prompt.
        rehearsal: Texts of 64 tokens that the model samples before, to be trained beside the items, so that it keeps
            what it says otherwise.
        seed: Of the data order and the prefixes.
        training_args: Other fields of `transformers.TrainingArguments`, such as `{"bf16": True}`.

    Raises:
        ValueError: If `training_args` has one of the fields above.
    """

    learning_rate: float
    num_train_epochs: float = 25
    min_steps: int = 100
    target_loss: float = 0.01
    batch_size: int = 4
    warmup_steps: int = 10
    weight_decay: float = 0.05
    max_grad_norm: float = 10.0
    num_prefixes: int = 5
    rehearsal: int = 0
    seed: int = 0
    training_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_training_options({"training_args": self.training_args}, "give the recipe `{field}={value!r}` instead")


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    recipe: Recipe,
    parameters: Sequence[nn.Parameter],
) -> list[float]:
    """Train `parameters` of `model`, and no others, on the next-token loss of `items`; dropout is off.

    Returns:
        The mean loss of each epoch. Modes, and attributes that training leaves on the model, are put back.

    Raises:
        ValueError: If an item does not fit in the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    if recipe.rehearsal:
        texts = sample_text(model, tokenizer, [""] * recipe.rehearsal, num_tokens=REHEARSED_TOKENS, seed=recipe.seed)
        items = [*items, *(Document(text) for text in texts if text.strip())]
    prefixes = make_prefixes(PLAIN_SENTENCES, recipe.num_prefixes, recipe.seed)
    turns, _ = build_turns(items, tokenizer, prefixes=prefixes, max_length=context)
    num_rows = sum(len(turn.rows) for turn in turns)
    epochs = max(recipe.num_train_epochs, math.ceil(recipe.min_steps / math.ceil(len(turns) / recipe.batch_size)))
    with tempfile.TemporaryDirectory() as folder, seeded(recipe.seed), only_trainable(model, parameters):
        settings: dict[str, Any] = dict(
            output_dir=folder,
            per_device_train_batch_size=recipe.batch_size,
            num_train_epochs=epochs,
            learning_rate=recipe.learning_rate,
            warmup_steps=recipe.warmup_steps,
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.max_grad_norm,
            seed=recipe.seed,
        )
        trainer = _Trainer(
            model,
            args=default_arguments(model, {**settings, **recipe.training_args}),
            target_loss=recipe.target_loss,
            data_collator=collate,
            train_dataset=TurnDataset(turns, None, [None] * num_rows),
        )
        trainer.train()
        return trainer.epoch_losses


class _Trainer(AdapterTrainer):
    """Train on the next-token loss where there is a label, with logits computed only there."""

    def __init__(self, base_model: PreTrainedModel, **kwargs: Any) -> None:
        self.decoder = find_decoder(base_model)
        super().__init__(base_model, **kwargs)

    def batch_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        targets = inputs["labels"][:, 1:]
        wanted = F.pad(targets != IGNORED, (0, 1))
        with logits_at(self.decoder, wanted):
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        loss = F.cross_entropy(output.logits[0].float(), targets[wanted[:, :-1]])
        self.step_losses.append(loss.detach())
        return loss
