"""Training of an encoder on transformers' Trainer: autoencoding, text continuation and instructions, mixed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.nonfinite import check_gradients, origin
from memory_adapters.base_model.quantised import differentiable, keep_unpacked
from memory_adapters.base_model.seeding import seeded
from memory_adapters.base_model.tokens import pad_rows
from memory_adapters.files.names import PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.tensors import read_tensors
from memory_adapters.memory_slots.loss import Query, Row, autoencoding_rows, distil, predict
from memory_adapters.peft_layers.rollback import rollback_on_error
from memory_adapters.training.checkpoints import checkpoint_to_resume
from memory_adapters.training.distributed import all_reduce_sum, weight_of_share

if TYPE_CHECKING:
    from memory_adapters.memory_slots.memory import SlotMemory

__all__ = ["EncoderTrainer", "Example", "TextExamples", "instruction_examples", "train_encoder"]


@dataclass(frozen=True)
class Example:
    """One thing to learn.

    Attributes:
        context: Token ids to compress; several spans if it is long.
        asked: What should follow the slots; None to ask for the context itself (autoencoding).
    """

    context: list[int]
    asked: Query | None = None


class TextExamples(Dataset):
    """Windows of running text: each is either to be given back, or to be continued.

    Args:
        ids: Token ids of the text.
        lengths: Least and most tokens of a context, so that several spans are seen from the first step.
        continuation: Tokens to continue.
        share: Of autoencoding among the examples.
        count: How many examples.
        seed: Of the windows; example i is always the same.

    Raises:
        ValueError: If the text is shorter than one example.
    """

    def __init__(
        self, ids: Sequence[int], lengths: tuple[int, int], continuation: int, share: float, count: int, seed: int = 0
    ) -> None:
        longest = lengths[1] + continuation
        if len(ids) < longest + 1:
            raise ValueError(f"`ids` has {len(ids)} tokens, fewer than one example of {longest} needs; give more text.")
        self.ids, self.lengths, self.continuation = list(ids), lengths, continuation
        self.share, self.count, self.seed = share, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        rng = random.Random(f"{self.seed}-{index}")
        length = rng.randint(*self.lengths)
        start = rng.randrange(len(self.ids) - length - self.continuation)
        context = self.ids[start : start + length]
        if rng.random() < self.share:
            return Example(context)
        following = self.ids[start + length : start + length + self.continuation]
        return Example(context, Query(following[:1], following[1:]))


def instruction_examples(rows: Iterable[Mapping[str, str]], tokenizer: Any) -> list[Example]:
    """Examples from rows of `context`, `prompt` and `response` texts; the response ends with the end of text."""
    found = []
    for row in rows:
        context = tokenizer(row["context"], add_special_tokens=False)["input_ids"]
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        found.append(Example(list(context), Query(prompt, [*response, tokenizer.eos_token_id])))
    return found


class EncoderTrainer(Trainer):
    """Moves an encoder's LoRA, memory tokens, scale and [AE]; the model stays frozen and in evaluation mode.

    Args:
        memory: The memory whose encoder is trained.
        kwargs: Passed to `transformers.Trainer`; datasets hold `Example`s.
    """

    def __init__(self, memory: SlotMemory, **kwargs: Any) -> None:
        self.memory = memory
        super().__init__(model=_Trained(memory), data_collator=list, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of what the examples ask, autoencoding and the rest weighed by their examples."""
        self.memory.model.eval()
        keep_unpacked(self.memory.model)
        for block in self.memory.encoder.decoder.blocks:
            block.training = self.args.gradient_checkpointing  # of itself alone: nothing in it drops out
        loss = model(inputs)
        if not torch.isfinite(loss):
            text = self.memory.tokenizer.decode(inputs[0].context[:16])
            encoder = self.memory.encoder
            where = origin(
                self.memory.model,
                encoder.decoder,
                pad_rows([inputs[0].context], encoder.device),
                "lower `learning_rate`, or use the model in bfloat16 or float32",
            )
            raise ValueError(
                f"The loss of the batch that begins with {text!r} is NaN or infinite in step {self.state.global_step}: "
                f"{where}."
            )
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; gradients that are not finite are an error that names the parameter."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.scaler is None:  # which skips such steps, and lowers its scale
            check_gradients((name, p) for name, p in self.memory.model.named_parameters() if p.requires_grad)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return model(inputs).detach(), None, None

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # examples are lists of ids: the encoder puts them on its device

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Checkpoints hold the encoder, not the base model."""
        self.memory.config.encoder_steps = self.state.global_step
        self.memory.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        expected = {PEFT_KEY_PREFIX + name: tensor.shape for name, tensor in self.memory.state_dict().items()}
        saved = read_tensors(Path(resume_from_checkpoint) / WEIGHTS_FILE, expected)
        with torch.no_grad():
            for name, tensor in self.memory.state_dict().items():
                tensor.copy_(saved[PEFT_KEY_PREFIX + name])


class _Trained(nn.Module):
    """The loss of a batch, as a module whose parameters that require gradients are the encoder's."""

    def __init__(self, memory: SlotMemory) -> None:
        super().__init__()
        self.base = memory.model
        self.memory: Callable[[], SlotMemory] = lambda: memory  # no submodule

    def activation_checkpointing_enable(self, **_settings: Any) -> None:
        """Of the base model, each block with the adapters of the pass that it is computed again for."""
        settings = {"use_reentrant": False, "context_fn": self.memory().encoder.recomputing}
        _checkpointing(self.base, "enable")(settings)

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name in earlier versions of transformers

    def forward(self, examples: Sequence[Example]) -> Tensor:
        memory = self.memory()
        encoder = memory.encoder
        spans: list[list[int]] = []
        sources: list[list[int]] = []
        for example in examples:
            own = memory.config.spans_of(example.context)
            sources.append(list(range(len(spans), len(spans) + len(own))))
            spans += own
        slots = encoder.slots(spans)
        told = [i for i, example in enumerate(examples) if example.asked is None]
        asked = [i for i, example in enumerate(examples) if example.asked is not None]
        end = memory.tokenizer.eos_token_id
        back = autoencoding_rows([examples[i].context for i in told], end, [sources[i] for i in told])
        rest = [Row(a, sources[i]) for i in asked if (a := examples[i].asked) is not None]
        total = encoder.parts.reconstruct.sum() * 0
        everyone = float(all_reduce_sum(torch.tensor(float(len(examples)), device=encoder.device)))
        for part, rows in ((told, back), (asked, rest)):
            weight = weight_of_share(sum(len(row.asked.target) for row in rows))
            share = float(all_reduce_sum(torch.tensor(float(len(part)), device=encoder.device))) / everyone
            if not part:
                continue
            if part is asked and memory.config.objective == "distillation":
                loss = distil(encoder, slots, rows, [examples[i].context for i in asked])
            else:
                loss = predict(encoder, slots, rows)[0].mean()
            total = total + share * weight * loss
        return total


def train_encoder(
    memory: SlotMemory,
    examples: Dataset | Sequence[Example],
    *,
    held_out: Dataset | Sequence[Example] | None = None,
    training_args: Mapping[str, Any] | None = None,
    resume_from_checkpoint: bool | str = False,
) -> list[dict[str, float]]:
    """Train the encoder of a memory; afterwards it is frozen again, and `write` uses it.

    If it fails or is interrupted, the encoder is what it was trained to by then.

    Args:
        memory: A memory with a tokenizer.
        examples: What to learn, such as `TextExamples` or `instruction_examples`.
        held_out: Examples whose loss is logged at every evaluation.
        training_args: Fields of `transformers.TrainingArguments`; give `output_dir` to be able to resume.
        resume_from_checkpoint: Go on from the newest whole checkpoint in `output_dir`, or from the one named.

    Returns:
        What was logged: loss, held-out loss, steps.
    """
    memory._check_writable()
    on_cpu = memory.model.device.type == "cpu"
    settings: dict[str, Any] = dict(
        output_dir="slot-encoder",
        learning_rate=1e-4,
        warmup_steps=300,
        max_grad_norm=2.0,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # a batch may ask for nothing of one kind
        label_names=[],
        seed=memory.config.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )
    arguments = TrainingArguments(**{**settings, **(training_args or {})})
    checkpoint = checkpoint_to_resume(resume_from_checkpoint, arguments.output_dir)
    model = memory.model
    with exclusive_use(model), rollback_on_error(model), seeded(memory.config.seed), evaluating(model):
        return _train(memory, arguments, examples, held_out, checkpoint)


def _train(
    memory: SlotMemory,
    arguments: TrainingArguments,
    examples: Dataset | Sequence[Example],
    held_out: Dataset | Sequence[Example] | None,
    checkpoint: str | None,
) -> list[dict[str, float]]:
    trained = [*memory.encoder.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        trainer = EncoderTrainer(memory, args=arguments, train_dataset=examples, eval_dataset=held_out)
        with differentiable(memory.model):
            trainer.train(resume_from_checkpoint=checkpoint)
        memory.config.encoder_steps = trainer.state.global_step
    finally:
        if arguments.gradient_checkpointing:
            _checkpointing(memory.model, "disable")()
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None
    return trainer.state.log_history


def _checkpointing(model: Any, action: str) -> Any:
    newer = getattr(model, f"activation_checkpointing_{action}", None)
    return newer or getattr(model, f"gradient_checkpointing_{action}")
