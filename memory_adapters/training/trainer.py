"""Train an adapter with transformers' Trainer while its base model stays frozen, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from memory_adapters.base_model.modes import left_as_it_was
from memory_adapters.base_model.nonfinite import check_gradients
from memory_adapters.base_model.quantised import differentiable, keep_unpacked
from memory_adapters.files.names import PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.tensors import read_tensors
from memory_adapters.training.checkpoints import check_same_data, record_data
from memory_adapters.training.distributed import all_reduce_sum, world_size
from memory_adapters.validation import shown

__all__ = ["AdapterTrainer", "SavedAdapter", "check_training_options", "default_arguments", "only_trainable"]

# Fields of `TrainingArguments` that a config has too, and what the config calls them.
CONFIG_FIELDS = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "num_train_epochs",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "warmup_steps": "warmup_steps",
    "seed": "seed",
    "per_device_train_batch_size": "batch_size",
}


class SavedAdapter(Protocol):
    """Describe what a checkpoint holds, such as a `Memory`."""

    def save_pretrained(self, save_directory: str) -> None: ...
    def state_dict(self) -> dict[str, Tensor]: ...


class AdapterTrainer(Trainer):
    """Train the parameters of a model that require gradients; the model stays in evaluation mode, without dropout.

    Subclasses define `batch_loss`, and add what `epoch_losses` should report to `step_losses`.

    Args:
        base_model: The Hugging Face model that the parameters belong to.
        adapter: What checkpoints hold and resume; None for those of Trainer, which hold the whole model.
        data_digest: `digest_of` the training data: a checkpoint of other data is not resumed. None for no check.
        target_loss: Training ends after an epoch whose mean loss is below this; 0 to make all passes.
        kwargs: Passed to `transformers.Trainer`, with `base_model` as `model` unless there is another.

    Attributes:
        step_losses: Losses of this epoch's steps, on this process.
        epoch_losses: Mean loss of each epoch, over all processes.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        *,
        adapter: SavedAdapter | None = None,
        data_digest: str | None = None,
        target_loss: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.base_model = base_model
        self.adapter = adapter
        self.data_digest = data_digest
        self.step_losses: list[Tensor] = []
        self.epoch_losses: list[float] = []
        super().__init__(**{"model": base_model, **kwargs})
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        if not self.args.disable_tqdm:
            self.add_callback(_ProgressBar)
        self.add_callback(_EpochLosses(self, target_loss))
        self.model_accepts_loss_kwargs = False  # losses are means over a batch, also while gradients accumulate

    def batch_loss(self, model: nn.Module, inputs: Any) -> Tensor:  # what the collator makes
        """Return the loss of a batch, a scalar."""
        raise NotImplementedError

    def set_modes(self) -> None:
        """Put the model into evaluation mode, from training mode, into which Trainer puts it before every step."""
        self.base_model.eval()
        keep_unpacked(self.base_model)

    def trained_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return what is trained, each parameter with the name that an error gives it."""
        return ((name, p) for name, p in self.base_model.named_parameters() if p.requires_grad)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return `batch_loss` in evaluation mode."""
        self.set_modes()
        loss = self.batch_loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do as Trainer does, and raise a `ValueError` that names a parameter whose gradient is not finite."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.scaler is None:  # a scaler skips such steps, and lowers its scale
            check_gradients(self.trained_parameters())
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.adapter is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            assert folder is not None  # `TrainingArguments` filled it in
            self.adapter.save_pretrained(folder)
            record_data(folder, self.data_digest)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        check_same_data(resume_from_checkpoint, self.data_digest)
        own = {PEFT_KEY_PREFIX + name: tensor for name, tensor in self.adapter.state_dict().items()}
        shapes = {name: tensor.shape for name, tensor in own.items()}
        saved = read_tensors(Path(resume_from_checkpoint) / WEIGHTS_FILE, shapes)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])


class _ProgressBar(ProgressCallback):
    """Show the latest loss in Trainer's progress bar, instead of a line for every log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=logs["loss"])


class _EpochLosses(TrainerCallback):
    """Collect the mean loss of every epoch, and end training when it is low enough."""

    def __init__(self, trainer: AdapterTrainer, target_loss: float) -> None:
        self.trainer, self.target_loss = trainer, target_loss

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.step_losses:
            losses = all_reduce_sum(torch.stack(self.trainer.step_losses)) / world_size()
            self.trainer.step_losses.clear()
            self.trainer.epoch_losses.append(losses.mean().item())
            control.should_training_stop |= self.trainer.epoch_losses[-1] < self.target_loss


def default_arguments(model: PreTrainedModel, settings: Mapping[str, Any]) -> TrainingArguments:
    """Return `settings` as `TrainingArguments` for the model's device.

    Unless they say otherwise, nothing is logged, saved or reported, and the learning rate falls as a cosine.
    """
    on_cpu = model.device.type == "cpu"
    defaults: dict[str, Any] = dict(
        lr_scheduler_type="cosine",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )
    return TrainingArguments(**{**defaults, **settings})


def check_training_options(options: Mapping[str, Any], remedy: str) -> None:
    """Raise an error that names an option of a write that cannot be used: `unrelated`, `callbacks`, `training_args`.

    Args:
        options: What a user gives to `write`.
        remedy: What to do instead of setting a field that the config has too, with `{field}` and `{value!r}`.

    Raises:
        TypeError: If an option is of another kind, or `training_args` has a field that `TrainingArguments` does not.
        ValueError: If `training_args` has a field that the config has too, or TensorBoard's files would be lost.
    """
    unrelated, callbacks = options.get("unrelated"), options.get("callbacks", ())
    texts = isinstance(unrelated, Sequence) and all(isinstance(text, str) for text in unrelated)
    if unrelated is not None and (isinstance(unrelated, str) or not texts):
        raise TypeError(f"`unrelated` must be a list of texts, got {shown(unrelated)}.")
    if not isinstance(callbacks, Sequence) or not all(isinstance(one, TrainerCallback) for one in callbacks):
        raise TypeError(f"`callbacks` must be a list of Trainer callbacks, got {shown(callbacks)}.")
    training_args = options.get("training_args") or {}
    known = {field.name for field in fields(TrainingArguments)}
    if not isinstance(training_args, Mapping) or not set(training_args) <= known:
        raise TypeError(f"`training_args` must map fields of TrainingArguments to values, got {shown(training_args)}.")
    given = training_args.get("report_to") or "none"
    reported = {given} if isinstance(given, str) else set(given)
    if reported & {"tensorboard", "all"} and "output_dir" not in training_args:
        raise ValueError(
            f"`training_args` has `report_to={given!r}`, but no `output_dir`, in which TensorBoard's files are "
            "written: add one, such as `{'output_dir': 'runs'}`."
        )
    for name, field in CONFIG_FIELDS.items():
        if name in training_args:
            value = training_args[name]
            raise ValueError(
                f"`training_args` has `{name}={value!r}`, which the config sets: "
                f"{remedy.format(field=field, value=value)}."
            )


@contextmanager
def only_trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters of a model require gradients within this context, for a Trainer in it.

    Afterwards flags and modes are what they were, and what Trainer left on the model is gone, gradients too.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    trained = set(parameters)
    try:
        with left_as_it_was(model):
            for parameter, _ in flags:
                parameter.requires_grad_(parameter in trained)
            with differentiable(model):
                yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter in trained:
            parameter.grad = None
