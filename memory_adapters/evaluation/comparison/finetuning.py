"""Train parameters of a model on items with `transformers.Trainer`: what memories are compared with."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.item_rows import IGNORED
from memory_adapters.base_model.modes import left_as_it_was
from memory_adapters.base_model.partial_forward import logits_at
from memory_adapters.base_model.sampling import PLAIN_SENTENCES
from memory_adapters.base_model.seeding import seeded
from memory_adapters.items import Item
from memory_adapters.training.dataset import TurnDataset, collate
from memory_adapters.training.rows import build_turns, make_prefixes

__all__ = ["Recipe", "train"]


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
        seed: Seed of the data order and the prefixes.
        training_args: Fields of `transformers.TrainingArguments` that override these, such as `{"bf16": True}`.
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
    seed: int = 0
    training_args: Mapping[str, Any] = field(default_factory=dict)


def train(
    model: Any, tokenizer: Any, items: Sequence[Item], recipe: Recipe, parameters: Sequence[nn.Parameter]
) -> list[float]:
    """Train `parameters` of `model`, and no others, on the next-token loss of `items`; dropout is off.

    Returns:
        The mean loss of each epoch. Modes, and attributes that training leaves on the model, are put back.

    Raises:
        ValueError: If an item does not fit in the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    prefixes = make_prefixes(PLAIN_SENTENCES, recipe.num_prefixes, recipe.seed)
    turns, _ = build_turns(items, tokenizer, prefixes=prefixes, max_length=context)
    num_rows = sum(len(turn.rows) for turn in turns)
    epochs = max(recipe.num_train_epochs, math.ceil(recipe.min_steps / math.ceil(len(turns) / recipe.batch_size)))
    with tempfile.TemporaryDirectory() as folder, seeded(recipe.seed), _only(model, parameters):
        settings: dict[str, Any] = dict(
            output_dir=folder,
            per_device_train_batch_size=recipe.batch_size,
            num_train_epochs=epochs,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=recipe.warmup_steps,
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.max_grad_norm,
            seed=recipe.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=model.device.type != "cpu",
        )
        trainer = _Trainer(
            model=model,
            args=TrainingArguments(**{**settings, **recipe.training_args}),
            data_collator=collate,
            train_dataset=TurnDataset(turns, None, [None] * num_rows),
        )
        trainer.add_callback(_EpochLosses(trainer, recipe.target_loss))
        trainer.train()
        return trainer.epoch_losses


class _Trainer(Trainer):
    """Compute the next-token loss where there is a label, with logits only there."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.step_losses: list[Tensor] = []
        self.epoch_losses: list[float] = []
        self.decoder = find_decoder(kwargs["model"])
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        if not self.args.disable_tqdm:
            self.add_callback(_Progress)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        model.eval()
        targets = inputs["labels"][:, 1:]
        wanted = F.pad(targets != IGNORED, (0, 1))
        with logits_at(self.decoder, wanted):
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        loss = F.cross_entropy(output.logits[0].float(), targets[wanted[:, :-1]])
        self.step_losses.append(loss.detach())
        return loss


class _Progress(ProgressCallback):
    """Show Trainer's progress bar without its log lines."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class _EpochLosses(TrainerCallback):
    """Collect the mean loss of every epoch, and end training when it is low enough."""

    def __init__(self, trainer: _Trainer, target: float) -> None:
        self.trainer, self.target = trainer, target

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses = self.trainer.step_losses
        if losses:
            self.trainer.epoch_losses.append(torch.stack(losses).mean().item())
            losses.clear()
            control.should_training_stop |= self.trainer.epoch_losses[-1] < self.target


@contextmanager
def _only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters require gradients; flags, modes and attributes are put back afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = set(parameters)
    for parameter in flags:
        parameter.requires_grad_(parameter in chosen)
    try:
        with left_as_it_was(model):
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
