"""Train a residual memory: next-token loss, context distillation and locality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments

from memory_adapters.base_model.decoder import Decoder
from memory_adapters.base_model.item_rows import IGNORED
from memory_adapters.base_model.nonfinite import rows_not_finite
from memory_adapters.base_model.partial_forward import logits_at
from memory_adapters.memory import Memory
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.layer import residual_layers
from memory_adapters.training.dataset import FilledSampler, TurnDataset, collate
from memory_adapters.training.distributed import mean_weight, world_size
from memory_adapters.training.stored_states import ReusedStates
from memory_adapters.training.trainer import AdapterTrainer, default_arguments

__all__ = ["MemoryTrainer", "parameters_of", "training_arguments"]

GATE_NAMES = ("gate", "gate_weight", "gate_bias")


class MemoryTrainer(AdapterTrainer):
    """Train one residual memory.

    Args:
        memory: The memory.
        decoder: Parts of its model.
        reuse: How to resume from stored states; None to run the whole model.
        data_digest: `digest_of` the training rows, for checkpoints.
        kwargs: Passed to `transformers.Trainer`.
    """

    def __init__(
        self,
        memory: Memory[MemoryAdapterConfig],
        decoder: Decoder,
        reuse: ReusedStates | None,
        data_digest: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.memory = memory
        self.config = memory.config
        self.decoder = decoder
        self.reuse = reuse
        super().__init__(
            memory.model,
            adapter=memory,
            data_digest=data_digest,
            target_loss=self.config.target_loss,
            data_collator=collate,
            **kwargs,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW; gates have a learning rate of their own and no weight decay."""
        gates: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.trained_parameters():
            (gates if name.endswith(GATE_NAMES) else rest).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": rest, "weight_decay": self.args.weight_decay, "lr": self.args.learning_rate},
                {"params": gates, "weight_decay": 0.0, "lr": self.config.gate_learning_rate},
            ]
        )
        return self.optimizer

    def trained_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return the memory's parameters, named by their block."""
        return parameters_of(self.memory).items()

    def set_modes(self) -> None:
        """Put the memory into training mode, for its dropout, and the rest of the model into evaluation mode."""
        super().set_modes()
        for layer in residual_layers(self.memory):
            layer.train()

    def batch_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the next-token loss and, if the config asks for them, context distillation and locality.

        Locality is not part of what `epoch_losses` reports, which is how well the items are learned.
        """
        targets = inputs["labels"][:, 1:]
        wanted = F.pad(targets != IGNORED, (0, 1))
        logits = self._logits(model, inputs, wanted)
        kept, share = inputs["kept"], self.config.distillation_weight
        learned = int((~kept).sum())
        weight = mean_weight(learned)
        own = logits.sum() * 0
        if learned:
            own = own + (1 - share) * F.cross_entropy(logits[~kept], targets[wanted[:, :-1]][~kept]) * weight
        distance = None
        if "teacher_ids" in inputs:
            distance = _divergence(logits, inputs["teacher_ids"], inputs["teacher_log_probs"])
        if distance is not None and learned and share > 0:
            own = own + share * distance[~kept].mean() * weight
        if learned or world_size() > 1:  # all processes must report as many losses
            self.step_losses.append(own.detach())
        loss = own
        if self.config.locality_weight > 0:
            weight = mean_weight(int(kept.sum()))
            if distance is not None and kept.any():
                loss = loss + self.config.locality_weight * distance[kept].mean() * weight
        if not torch.isfinite(loss):
            self._raise_not_finite(inputs, logits, wanted)
        return loss

    def _raise_not_finite(self, inputs: dict[str, Tensor], logits: Tensor, wanted: Tensor) -> NoReturn:
        """Raise a `ValueError` that names the text on which the loss is NaN or infinite."""
        bad = rows_not_finite(logits)
        row = wanted.nonzero()[bad[0], 0] if bad else wanted.new_zeros((), dtype=torch.long)
        text = self.memory._require_tokenizer().decode(inputs["input_ids"][row][inputs["attention_mask"][row].bool()])
        raise ValueError(
            f"The loss on {text!r} is NaN or infinite in step {self.state.global_step}: lower `learning_rate` and "
            "`gate_learning_rate`, or use the model in bfloat16 or float32."
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if world_size() == 1:
            return super()._get_train_sampler(train_dataset)
        dataset = cast(TurnDataset, train_dataset or self.train_dataset)
        return FilledSampler(dataset, self.args.train_batch_size * world_size())

    def _logits(self, model: nn.Module, inputs: dict[str, Tensor], wanted: Tensor) -> Tensor:
        """Return logits (wanted.sum(), vocabulary) in float32."""
        with ExitStack() as stack:
            stack.enter_context(logits_at(self.decoder, wanted))
            if self.reuse is not None:
                stack.enter_context(self.reuse.resume(inputs["states"]))
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return output.logits[0].float()


def parameters_of(memory: Memory[MemoryAdapterConfig]) -> dict[str, nn.Parameter]:
    """Return what training a residual memory moves, by block and name."""
    config = memory.config
    return {
        f"block {block}: {name}": parameter
        for block, layer in zip(config.depths, residual_layers(memory), strict=True)
        for name, parameter in layer.mlp(memory.adapter_name).named_parameters()
    }


def training_arguments(
    memory: Memory[MemoryAdapterConfig], output_dir: str, training_args: Mapping[str, Any] | None, num_turns: int
) -> TrainingArguments:
    """Return the config's settings as `TrainingArguments`, for so many turns an epoch.

    Args:
        memory: The memory.
        output_dir: Where checkpoints go, unless `training_args` says otherwise.
        training_args: Other fields, which the config does not have.
        num_turns: Turns of an epoch.
    """
    config = memory.config
    steps_an_epoch = -(-num_turns // config.batch_size)
    settings: dict[str, Any] = dict(
        output_dir=output_dir,
        per_device_train_batch_size=-(-config.batch_size // world_size()),
        num_train_epochs=max(config.num_train_epochs, -(-config.min_steps // steps_an_epoch)),
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
    )
    return default_arguments(memory.model, {**settings, **(training_args or {})})


def _divergence(logits: Tensor, teacher_ids: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return KL(teacher ‖ model) (labels,), over the teacher's likeliest tokens and all others taken as one."""
    log_probs = logits.log_softmax(-1).gather(-1, teacher_ids)
    probs = teacher_log_probs.exp()
    rest, teacher_rest = ((1 - p.sum(-1)).clamp_min(1e-6) for p in (log_probs.exp(), probs))
    head = torch.where(probs > 0, probs * (teacher_log_probs - log_probs), 0).sum(-1)
    return head + teacher_rest * (teacher_rest.log() - rest.log())
