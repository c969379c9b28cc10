"""Train an encoder on autoencoding, text continuation and instructions, mixed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.chat import chat_start
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.modes import own_settings
from memory_adapters.base_model.nonfinite import origin
from memory_adapters.base_model.seeding import seeded
from memory_adapters.base_model.tokens import pad_rows, tokenize
from memory_adapters.memory_slots.config import MemorySlotsConfig
from memory_adapters.memory_slots.distillation import encoder_loss
from memory_adapters.memory_slots.encoder import Encoder
from memory_adapters.memory_slots.loss import Query, Row, autoencoding_rows, distil, predict
from memory_adapters.memory_slots.prompts import END
from memory_adapters.training.checkpoints import checkpoint_to_resume, digest_of
from memory_adapters.training.distributed import all_reduce_sum, mean_weight
from memory_adapters.training.trainer import AdapterTrainer, SavedAdapter, default_arguments, only_trainable

__all__ = ["EncoderTrainer", "Example", "TextExamples", "instruction_examples", "train_encoder"]

DIGESTED_EXAMPLES = 100  # by which a checkpoint knows its data again


class MemoryWithEncoder(SavedAdapter, Protocol):
    """Describe a `SlotMemory`, as far as its encoder's training goes."""

    encoder: Encoder

    @property
    def config(self) -> MemorySlotsConfig: ...
    def _check_writable(self) -> None: ...
    def _require_tokenizer(self) -> PreTrainedTokenizerBase: ...


@dataclass(frozen=True)
class Example:
    """Store one thing to learn.

    Attributes:
        context: Token ids to compress; several spans if it is long.
        asked: What should follow the slots; None to ask for the context itself (autoencoding).
    """

    context: list[int]
    asked: Query | None = None


class TextExamples(Dataset):
    """Cut running text into windows, each of which is either to be given back or to be continued.

    Args:
        ids: Token ids of the text.
        lengths: Least and most tokens of a context, so that several spans are seen from the first step.
        continuation: Number of tokens that continue a context.
        share: Share of autoencoding among the examples, in [0, 1].
        count: Number of examples.
        seed: Seed of the windows; example i is always the same.

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


def instruction_examples(rows: Iterable[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Make examples of rows of `context`, `prompt` and `response` texts; the response ends with the end of text."""
    found = []
    for row in rows:
        context = tokenizer(row["context"], add_special_tokens=False)["input_ids"]
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        found.append(Example(list(context), Query(prompt, [*response, tokenizer.eos_token_id])))
    return found


class EncoderTrainer(AdapterTrainer):
    """Train an encoder: its LoRA, memory tokens, projection and [AE].

    Args:
        memory: The memory whose encoder is trained.
        kwargs: Passed to `transformers.Trainer`; datasets hold `Example`s.
    """

    def __init__(self, memory: MemoryWithEncoder, *, train_dataset: Any, **kwargs: Any) -> None:
        self.memory = memory
        super().__init__(
            memory.encoder.model,
            adapter=memory,
            data_digest=_digest(train_dataset),
            model=_BatchLoss(memory),
            train_dataset=train_dataset,
            data_collator=list,
            **kwargs,
        )

    def set_modes(self) -> None:
        """Put the model into evaluation mode; blocks that checkpoint their activations do so in training mode alone."""
        super().set_modes()
        for block in self.memory.encoder.decoder.blocks:
            block.training = bool(self.args.gradient_checkpointing)  # the block's own flag: nothing in it drops out

    def batch_loss(self, model: nn.Module, inputs: Sequence[Example]) -> Tensor:
        """Return the mean loss of what the examples ask; each kind of example counts by its number."""
        loss: Tensor = model(inputs)
        if not torch.isfinite(loss):
            encoder, context = self.memory.encoder, inputs[0].context
            text = self.memory._require_tokenizer().decode(context[:16])
            remedy = "lower `learning_rate`, or use the model in bfloat16 or float32"
            where = origin(encoder.model, encoder.decoder, pad_rows([context], encoder.device), remedy)
            raise ValueError(
                f"The loss of the batch that begins with {text!r} is NaN or infinite in step {self.state.global_step}: "
                f"{where}."
            )
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch of the held-out examples."""
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # lists of token ids, which the encoder puts on its device

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        self.memory.config.encoder_steps = self.state.global_step
        super()._save(output_dir, state_dict)


class _BatchLoss(nn.Module):
    """Compute the loss of a batch in a module, whose `forward` Trainer and DDP wrap."""

    def __init__(self, memory: MemoryWithEncoder) -> None:
        super().__init__()
        self.base = memory.encoder.model
        self.memory: Callable[[], MemoryWithEncoder] = lambda: memory  # not a submodule

    def activation_checkpointing_enable(self, **_settings: Any) -> None:
        """Checkpoint the base model's activations; a block is recomputed with the adapters of its first pass."""
        settings = {"use_reentrant": False, "context_fn": self.memory().encoder.recomputing}
        _checkpointing(self.base, "enable")(settings)

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name in earlier versions of transformers

    def forward(self, examples: Sequence[Example]) -> Tensor:
        """Return the loss, with a factor so that the mean over processes is that of all examples."""
        memory = self.memory()
        encoder = memory.encoder
        if memory.config.space == "kv":
            return self._of_keys_values(examples)
        spans: list[list[int]] = []
        own: list[list[int]] = []  # of each example: which of the spans are its own
        for example in examples:
            parts = memory.config.spans_of(example.context)
            own.append(list(range(len(spans), len(spans) + len(parts))))
            spans += parts
        slots = encoder.slots(spans)
        back = [i for i, example in enumerate(examples) if example.asked is None]
        end = memory._require_tokenizer().eos_token_id
        autoencoding = autoencoding_rows([examples[i].context for i in back], end, [own[i] for i in back])
        asked = [i for i, example in enumerate(examples) if example.asked is not None]
        rest = [Row(query, own[i]) for i in asked if (query := examples[i].asked) is not None]
        counts = torch.tensor([len(autoencoding), len(rest)], dtype=torch.float32, device=encoder.device)
        counts = all_reduce_sum(counts)
        total = encoder.parts.reconstruct.sum() * 0  # [AE] has a gradient also where no example asks for the text
        for rows, share in zip((autoencoding, rest), counts / counts.sum(), strict=True):
            weight = mean_weight(sum(len(row.asked.target) for row in rows))
            if not rows:
                continue
            if rows is rest and memory.config.objective == "distillation":
                loss = distil(encoder, slots, rows, [examples[i].context for i in asked])
            else:
                loss = predict(encoder, slots, rows)[0].mean()
            total = total + share * weight * loss
        return total

    def _of_keys_values(self, examples: Sequence[Example]) -> Tensor:
        memory = self.memory()
        encoder, tokenizer = memory.encoder, memory._require_tokenizer()
        prefix = chat_start(tokenizer) if memory.config.opening else []
        separator = tokenize(tokenizer, END, rendered=True)
        total = encoder.parts.reconstruct.sum() * 0  # what this encoder has no use for has a gradient, too
        total = total + encoder.parts.projection.sum() * 0 + encoder.parts.memory_tokens.sum() * 0
        losses = [encoder_loss(encoder, prefix, separator, one.context, one.asked) for one in examples]
        weight = mean_weight(sum(tokens for _, tokens in losses))
        return total + weight * sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)


def train_encoder(
    memory: MemoryWithEncoder,
    examples: Dataset | Sequence[Example],
    *,
    held_out: Dataset | Sequence[Example] | None = None,
    training_args: Mapping[str, Any] | None = None,
    resume_from_checkpoint: bool | str = False,
) -> list[dict[str, float]]:
    """Train the encoder of a memory; afterwards it is frozen again, and `write` uses it.

    If it fails or is interrupted, the encoder stays as far as it was trained by then.

    Args:
        memory: A `SlotMemory` with a tokenizer.
        examples: What to learn, such as `TextExamples` or `instruction_examples`; example i must always be the same.
        held_out: Examples whose loss is logged at every evaluation.
        training_args: Fields of `transformers.TrainingArguments`; give `output_dir` to be able to resume.
        resume_from_checkpoint: Continue from the newest complete checkpoint in `output_dir`, or from the one named.

    Returns:
        Trainer's log: loss, held-out loss, steps.
    """
    memory._check_writable()
    encoder, config = memory.encoder, memory.config
    checkpointing = {"activation_checkpointing", "gradient_checkpointing"}
    if config.space == "kv" and any((training_args or {}).get(name) for name in checkpointing):
        raise ValueError(
            "`activation_checkpointing` does not work where the encoder makes keys and values, which are read from a "
            "cache: leave it out, and give shorter contexts."
        )
    settings: dict[str, Any] = dict(
        output_dir="slot-encoder",
        learning_rate=1e-4,
        warmup_steps=300,
        max_grad_norm=2.0,
        logging_strategy="steps",
        ddp_find_unused_parameters=True,  # a batch may ask for nothing of one kind
        seed=config.seed,
    )
    arguments = default_arguments(encoder.model, {**settings, **(training_args or {})})
    checkpoint = checkpoint_to_resume(resume_from_checkpoint, arguments.output_dir)
    model = encoder.model
    with (
        exclusive_use(model),
        own_settings(),
        seeded(config.seed),
        only_trainable(model, encoder.parameters()),
    ):
        trainer = EncoderTrainer(memory, args=arguments, train_dataset=examples, eval_dataset=held_out)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if arguments.gradient_checkpointing:
                _checkpointing(model, "disable")()
        config.encoder_steps = trainer.state.global_step
    return trainer.state.log_history


def _digest(examples: Any) -> str:
    """Return a digest of the number of examples and of the first of them."""
    first = (examples[i].context for i in range(min(len(examples), DIGESTED_EXAMPLES)))
    return digest_of([[len(examples)], *first])


def _checkpointing(model: PreTrainedModel, action: str) -> Callable[..., None]:
    newer = getattr(model, f"activation_checkpointing_{action}", None)
    return newer or getattr(model, f"gradient_checkpointing_{action}")
