"""Training of a residual memory on transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft.functional import set_requires_grad
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from memory_adapters.base_model.decoder import Decoder
from memory_adapters.base_model.item_rows import IGNORED
from memory_adapters.base_model.modes import left_as_it_was
from memory_adapters.base_model.nonfinite import check_gradients, rows_not_finite
from memory_adapters.base_model.partial_forward import logits_at
from memory_adapters.base_model.quantised import differentiable, keep_unpacked
from memory_adapters.files.names import PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.tensors import read_tensors
from memory_adapters.memory import Memory
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.stored_states import ReusedStates
from memory_adapters.training.checkpoints import check_mark, mark_checkpoint
from memory_adapters.training.dataset import FilledSampler, collate
from memory_adapters.training.distributed import all_reduce_sum, weight_of_share, world_size

__all__ = ["MemoryTrainer", "training_arguments"]

GATE_NAMES = ("gate", "gate_weight", "gate_bias")


class MemoryTrainer(Trainer):
    """Trains one residual memory: only its parameters move, the base stays in evaluation mode.

    Args:
        memory: The memory.
        decoder: Parts of its model.
        reuse: How to resume from stored states; None to run the whole model.
        rows_sha256: What is trained on, for its checkpoints.
        kwargs: Passed to `transformers.Trainer`.
    """

    def __init__(
        self,
        memory: Memory[MemoryAdapterConfig],
        decoder: Decoder,
        reuse: ReusedStates | None,
        rows_sha256: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.memory = memory
        self.decoder = decoder
        self.reuse = reuse
        self.rows_sha256 = rows_sha256
        self.epoch_losses: list[float] = []
        self.step_losses: list[Tensor] = []
        super().__init__(model=memory.model, data_collator=collate, **kwargs)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if not self.args.disable_tqdm:
            self.add_callback(_Progress)
        self.add_callback(_EpochLosses(self))
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; gates have a learning rate of their own and no weight decay."""
        gates: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for layer in self.memory.tuner_layers():
            for name, parameter in layer.memory_adapter_mlp[self.memory.adapter_name].named_parameters():
                (gates if name in GATE_NAMES else rest).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": rest, "weight_decay": self.args.weight_decay, "lr": self.args.learning_rate},
                {"params": gates, "weight_decay": 0.0, "lr": self.memory.config.gate_learning_rate},
            ]
        )
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Next-token loss and, if the config asks for them, context distillation and locality."""
        self.memory.model.eval()
        for layer in self.memory.tuner_layers():
            layer.train()
        keep_unpacked(self.memory.model)
        config = self.memory.config
        targets = inputs["labels"][:, 1:]
        wanted = F.pad(targets != IGNORED, (0, 1))
        logits = self._logits(model, inputs, wanted)
        kept, share = inputs["kept"], config.distillation_weight
        learned = int((~kept).sum())
        weight = weight_of_share(learned)
        own = logits.sum() * 0
        if learned:
            own = own + (1 - share) * F.cross_entropy(logits[~kept], targets[wanted[:, :-1]][~kept]) * weight
        distance = None
        if "teacher_ids" in inputs:
            distance = _divergence(logits, inputs["teacher_ids"], inputs["teacher_log_probs"])
        if distance is not None and learned and share > 0:
            own = own + share * distance[~kept].mean() * weight
        if learned or world_size() > 1:
            self.step_losses.append(own.detach())
        loss = own
        if config.locality_weight > 0:
            weight = weight_of_share(int(kept.sum()))
            if distance is not None and kept.any():
                loss = loss + config.locality_weight * distance[kept].mean() * weight
        if not torch.isfinite(loss):
            self._explain(inputs, logits, wanted)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _explain(self, inputs: dict[str, Tensor], logits: Tensor, wanted: Tensor) -> NoReturn:
        """Raise a `ValueError` that names the text on which the loss is NaN or infinite."""
        bad = rows_not_finite(logits)
        row = wanted.nonzero()[bad[0], 0] if bad else wanted.new_zeros((), dtype=torch.long)
        text = self.memory.tokenizer.decode(inputs["input_ids"][row][inputs["attention_mask"][row].bool()])
        raise ValueError(
            f"The loss on {text!r} is NaN or infinite in step {self.state.global_step}: lower `learning_rate` and "
            "`gate_learning_rate`, or use the model in bfloat16 or float32."
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; gradients that are not finite are an error that names the parameter."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.scaler is None:  # which skips such steps, and lowers its scale
            layers = zip(self.memory.config.depths, self.memory.tuner_layers(), strict=True)
            check_gradients(
                (f"block {block}: {name}", parameter)
                for block, layer in layers
                for name, parameter in layer.memory_adapter_mlp[self.memory.adapter_name].named_parameters()
            )
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if world_size() == 1:
            return super()._get_train_sampler(train_dataset)
        return FilledSampler(train_dataset or self.train_dataset, self.args.train_batch_size * world_size())

    def _logits(self, model: nn.Module, inputs: dict[str, Tensor], wanted: Tensor) -> Tensor:
        """Logits (wanted.sum(), vocabulary) in float32."""
        with ExitStack() as stack:
            stack.enter_context(logits_at(self.decoder, wanted))
            if self.reuse is not None:
                stack.enter_context(self.reuse.resume(inputs["states"]))
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return output.logits[0].float()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Checkpoints hold the memory, not the base model."""
        self.memory.save_pretrained(output_dir or self.args.output_dir)
        mark_checkpoint(output_dir or self.args.output_dir, self.rows_sha256)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        check_mark(resume_from_checkpoint, self.rows_sha256)
        load_weights(self.memory, resume_from_checkpoint)


def load_weights(memory: Memory[MemoryAdapterConfig], folder: Path | str) -> None:
    """Put the tensors of a saved memory with the same settings into `memory`."""
    expected = {PEFT_KEY_PREFIX + name: tensor.shape for name, tensor in memory.state_dict().items()}
    tensors = read_tensors(Path(folder) / WEIGHTS_FILE, expected)
    memory._restore(tensors)


def training_arguments(
    memory: Memory[MemoryAdapterConfig], folder: str, overrides: Mapping[str, Any] | None, num_slots: int
) -> TrainingArguments:
    """The config's settings as `TrainingArguments`, for so many slots an epoch; `overrides` win."""
    config = memory.config
    steps_an_epoch = -(-num_slots // config.batch_size)
    settings: dict[str, Any] = dict(
        output_dir=folder,
        per_device_train_batch_size=-(-config.batch_size // world_size()),
        num_train_epochs=max(config.num_train_epochs, -(-config.min_steps // steps_an_epoch)),
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=memory.model.device.type == "cpu",
        dataloader_pin_memory=memory.model.device.type != "cpu",
    )
    return TrainingArguments(**{**settings, **(overrides or {})})


def _divergence(logits: Tensor, teacher_ids: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """KL(teacher ‖ model) at each label (labels,), over the teacher's likeliest tokens and all others taken as one."""
    log_probs = logits.log_softmax(-1).gather(-1, teacher_ids)
    probs = teacher_log_probs.exp()
    rest, teacher_rest = ((1 - p.sum(-1)).clamp_min(1e-6) for p in (log_probs.exp(), probs))
    head = torch.where(probs > 0, probs * (teacher_log_probs - log_probs), 0).sum(-1)
    return head + teacher_rest * (teacher_rest.log() - rest.log())


class _Progress(ProgressCallback):
    """Trainer's progress bar without its log lines."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class _EpochLosses(TrainerCallback):
    """Collects the mean loss of every epoch, and ends training when it is low enough."""

    def __init__(self, trainer: MemoryTrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.step_losses:
            losses = all_reduce_sum(torch.stack(self.trainer.step_losses)) / world_size()
            self.trainer.epoch_losses.append(losses.mean().item())
            self.trainer.step_losses.clear()
            if self.trainer.epoch_losses[-1] < self.trainer.memory.config.target_loss:
                control.should_training_stop = True


@contextmanager
def trainable_alone(memory: Memory[MemoryAdapterConfig]) -> Iterator[None]:
    """Only this memory's parameters require gradients; modes and flags are put back afterwards."""
    model: nn.Module = memory.model
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with left_as_it_was(model):
            model.requires_grad_(False)
            set_requires_grad(model, adapter_names=memory.adapter_name, requires_grad=True)
            with differentiable(model):
                yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None if not flag else parameter.grad
