"""Train the values of many things at once, each on its own rows, with its own moments, clipping and end."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.modes import plain_attention
from memory_adapters.base_model.partial_forward import logits_at
from memory_adapters.base_model.tokens import batches_of
from memory_adapters.memory import Memory
from memory_adapters.training.row_suffixes import RowSuffixes

__all__ = ["OTHER", "Recipe", "ThingRows", "ThingValues", "train_things"]

OTHER = -1  # the item of rows in which nothing is written: questions about the thing that keep their answers
LIKELIEST = 32  # tokens of the base model's distribution that are kept
STEP_TOKENS = 2048  # run at once; more are run in parts
GROUP_ROWS = 1024  # of all things that are trained at once
MOST_ON_GPU = 8  # times as many tokens and rows, on a GPU that has the memory
STATES = 32  # about how many hidden states training keeps of a token in a block


@dataclass(frozen=True)
class ThingRows:
    """Store what one thing's values are trained on.

    Attributes:
        name: The thing's.
        rows: Token ids.
        starts: For each row, the token from which on the values act.
        first_labels: For each row, the first token that is to be predicted; behind its start.
        items: For each row, the index of what is written in it, or `OTHER`: each step reads rows of all of the thing's
            items, and as many others.
    """

    name: str
    rows: list[list[int]]
    starts: list[int]
    first_labels: list[int]
    items: list[int]


class Recipe(Protocol):
    """Describe the settings that training reads; see `GatedLoraConfig`."""

    learning_rate: float
    num_train_epochs: float
    steps_per_epoch: int
    target_loss: float
    max_grad_norm: float
    warmup_steps: int
    seed: int


class ThingValues(Protocol):
    """Describe what is trained of a group of things."""

    @property
    def tensors(self) -> list[Tensor]:
        """The trained tensors (things, …)."""

    def acting(self, owners: Tensor, mask: Tensor | None) -> AbstractContextManager[None]:
        """Let thing `owners[i]`, and nothing that is written, act in row i of a batch within this context.

        Args:
            owners: (rows,).
            mask: Where it acts (rows, tokens); None for everywhere.
        """


def train_things(
    memory: Memory,
    decoder: Decoder,
    things: Sequence[ThingRows],
    recipe: Recipe,
    make: Callable[[int], ThingValues],
    *,
    first_block: int,
    progress: bool,
) -> tuple[list[Tensor], list[float]]:
    """Train values for each thing, from the same start for all, so that each is what it would be alone.

    Args:
        memory: The memory.
        decoder: Parts of its model.
        things: What to train.
        recipe: Settings.
        make: Returns the values, as training begins, of so many things.
        first_block: Lowest block that the values act in; its input does not change.
        progress: Whether to show a progress bar.

    Returns:
        The trained tensors, in the order of `things`, and the mean loss of each pass over those that made it.

    Raises:
        ValueError: If a loss or a gradient is NaN or infinite; names the thing.
    """
    found: list[list[Tensor]] = []
    losses: list[list[float]] = []
    with tqdm(total=len(things), desc="Training", unit="thing", disable=not progress) as bar:
        times = _times_as_many(decoder, first_block)
        for group in _groups(things, times * GROUP_ROWS):
            trainer = _Trainer(memory, decoder, group, recipe, make(len(group)), first_block, bar, times * STEP_TOKENS)
            found.append(trainer.train())
            losses += trainer.losses
    passes = max(map(len, losses), default=0)
    means = [[own[i] for own in losses if len(own) > i] for i in range(passes)]
    return [torch.cat(parts) for parts in zip(*found, strict=True)], [sum(values) / len(values) for values in means]


def _times_as_many(decoder: Decoder, first_block: int) -> int:
    """Return how many times the tokens and rows that a CPU takes at once fit into a quarter of a GPU's free memory."""
    device = execution_device(decoder.blocks[first_block])
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    a_token = STATES * decoder.hidden_size * (decoder.num_layers - first_block) * 4  # of 4 bytes at most
    return max(1, min(MOST_ON_GPU, free // 4 // (a_token * STEP_TOKENS)))


def _groups(things: Sequence[ThingRows], most_rows: int) -> Iterator[list[ThingRows]]:
    group: list[ThingRows] = []
    for thing in things:
        if group and sum(len(one.rows) for one in [*group, thing]) > most_rows:
            yield group
            group = []
        group.append(thing)
    if group:
        yield group


class _Trainer:
    """Train the values of a group of things.

    Attributes:
        losses: For each thing, the mean loss of each pass.
    """

    def __init__(
        self,
        memory: Memory,
        decoder: Decoder,
        things: Sequence[ThingRows],
        recipe: Recipe,
        values: ThingValues,
        first_block: int,
        bar: tqdm,
        step_tokens: int,
    ) -> None:
        self.memory, self.decoder, self.things, self.bar = memory, decoder, things, bar
        self.step_tokens = step_tokens
        self.recipe, self.values, self.parameters = recipe, values, values.tensors
        rows = [row for thing in things for row in thing.rows]
        starts = [start for thing in things for start in thing.starts]
        with memory.disabled():
            self.suffixes = RowSuffixes(memory.model, decoder, first_block - 1, rows, starts)
        self.is_other = [item == OTHER for thing in things for item in thing.items]
        self.first_labels = [first for thing in things for first in thing.first_labels]
        ends = torch.tensor([len(thing.rows) for thing in things]).cumsum(0).tolist()
        self.own: list[list[list[int]]] = [  # of each thing, the rows of each item
            [
                [end - len(thing.rows) + i for i, own in enumerate(thing.items) if own == item]
                for item in sorted(set(thing.items))
            ]
            for thing, end in zip(things, ends, strict=True)
        ]
        self.base = self._base_answers()
        # A thing's order depends on nothing but itself, so that it learns the same in any company.
        self.orders = [random.Random(f"{self.recipe.seed} {thing.name}") for thing in things]
        self.decks: list[list[list[int]]] = [[[] for _ in own] for own in self.own]
        self.losses: list[list[float]] = [[] for _ in things]

    def train(self) -> list[Tensor]:
        """Return the trained tensors."""
        recipe, per_pass = self.recipe, self.recipe.steps_per_epoch
        steps = max(round(recipe.num_train_epochs * per_pass), 1)
        optimizer = torch.optim.AdamW(self.parameters, lr=recipe.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / max(recipe.warmup_steps, 1), 1) * (steps - step) / steps
        )
        active = list(range(len(self.things)))
        ended: dict[int, list[Tensor]] = {}
        step_losses: list[Tensor] = []
        for step in range(steps):
            optimizer.zero_grad()
            step_losses.append(self._step(active))
            self._clip(active)
            optimizer.step()
            schedule.step()
            if (step + 1) % per_pass and step + 1 < steps:
                continue
            means = torch.stack(step_losses).mean(0).tolist()
            step_losses = []
            for thing in active:
                self.losses[thing].append(means[thing])
            done = {t for t in active if means[t] < recipe.target_loss or step + 1 == steps}
            for thing in done:  # the optimiser's moments would move it on
                ended[thing] = [parameter[thing].detach().clone() for parameter in self.parameters]
            active = [thing for thing in active if thing not in done]
            self.bar.update(len(done))
            if not active:
                break
        return [torch.stack(own) for own in zip(*(ended[thing] for thing in range(len(self.things))), strict=True)]

    def _step(self, active: Sequence[int]) -> Tensor:
        """Add the gradients of a step on some rows of each active thing, and return all losses (things,)."""
        chosen = [(row, thing) for thing in active for row in self._drawn(thing)]
        labels = torch.zeros(len(self.things))
        for row, thing in chosen:
            if not self.is_other[row]:
                labels[thing] += len(self.suffixes.rows[row]) - self.first_labels[row]
        weights = 1 / labels.clamp(min=1)
        losses = torch.zeros(len(self.things), device=self.suffixes.device)
        chosen.sort(key=lambda pair: self.suffixes.length(pair[0]))
        part: list[tuple[int, int]] = []
        for pair in chosen:
            if part and (len(part) + 1) * self.suffixes.length(pair[0]) > self.step_tokens:
                losses += self._backward(part, weights)
                part = []
            part.append(pair)
        losses += self._backward(part, weights)
        if not torch.isfinite(losses).all():
            self._refuse(losses, "loss")
        return losses

    def _drawn(self, thing: int) -> list[int]:
        """Return the rows of a thing's next step: of each item, without repetition until all of its were read."""
        drawn: list[int] = []
        items = sum(not self.is_other[own[0]] for own in self.own[thing])
        for own, deck in zip(self.own[thing], self.decks[thing], strict=True):
            number = max(math.ceil(len(own) / self.recipe.steps_per_epoch), 2)
            for _ in range(items if self.is_other[own[0]] else number):
                if not deck:
                    deck += own
                    self.orders[thing].shuffle(deck)
                drawn.append(deck.pop())
        return drawn

    def _backward(self, part: Sequence[tuple[int, int]], weights: Tensor) -> Tensor:
        """Add the gradients of the mean loss of each thing's labels, in rows that are (row, thing)."""
        indices = [row for row, _ in part]
        batch = self.suffixes.batch(indices)
        ids = batch.inputs["input_ids"]
        wanted = self._wanted(indices, ids)
        acts = torch.zeros(ids.shape, dtype=torch.bool)
        for place, offset in enumerate(batch.offsets):
            acts[place, offset:] = True
        owners = torch.tensor([thing for _, thing in part])
        where = wanted.nonzero()[:, 0].cpu()
        of_label = owners[where]
        device = ids.device
        mask = None if acts.all() else acts.to(device)
        tokens, shares = self._targets(indices, ids.roll(-1, 1)[wanted])
        with (
            torch.enable_grad(),
            self.values.acting(owners.to(device), mask),
            self.suffixes.resume(batch),
            logits_at(self.decoder, wanted),
            plain_attention(device),
        ):
            logits = self.memory.model(**batch.inputs).logits[0].float()
            each = -(F.log_softmax(logits, -1).gather(1, tokens) * shares).sum(1)
            (each * weights[of_label].to(device)).sum().backward()
        found = torch.zeros(len(self.things), device=device)
        counts = torch.tensor([not self.is_other[row] for row in indices])[where].to(each)  # how well items are learned
        return found.index_add(0, of_label.to(device), each.detach() * weights[of_label].to(device) * counts)

    def _targets(self, indices: Sequence[int], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for each label of rows, tokens (labels, k) and the shares of the loss that each has (labels, k).

        Of what is written it is the label itself; of other questions, what the base model says there, as likely as it
        does: the loss is then KL(base ‖ memory) on its `LIKELIEST` tokens, up to a constant.
        """
        counts = [len(self.suffixes.rows[i]) - self.first_labels[i] for i in indices]
        if not any(self.is_other[i] for i in indices):
            return labels[:, None], labels.new_ones(len(labels), 1, dtype=torch.float)
        tokens = labels[:, None].repeat(1, LIKELIEST)
        shares = torch.zeros(tokens.shape, device=labels.device)
        shares[:, 0] = 1
        end = 0
        for i, count in zip(indices, counts, strict=True):
            start, end = end, end + count
            if self.is_other[i]:
                tokens[start:end], shares[start:end] = self.base[i]
        return tokens, shares

    @torch.no_grad()
    def _base_answers(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the likeliest tokens, and their probabilities, at the labels of rows in which nothing is written."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        others = [i for i, other in enumerate(self.is_other) if other]
        for part in batches_of([self.suffixes.rows[i] for i in others], self.step_tokens):
            indices = [others[i] for i in part]
            batch = self.suffixes.batch(indices)
            wanted = self._wanted(indices, batch.inputs["input_ids"])
            with self.memory.disabled(), self.suffixes.resume(batch), logits_at(self.decoder, wanted):
                likely = self.memory.model(**batch.inputs).logits[0].float().softmax(-1).topk(LIKELIEST)
            shares = likely.values / likely.values.sum(-1, keepdim=True)
            counts = [len(self.suffixes.rows[i]) - self.first_labels[i] for i in indices]
            parts = zip(indices, likely.indices.split(counts), shares.split(counts), strict=True)
            found |= {i: (tokens, share) for i, tokens, share in parts}
        return found

    def _wanted(self, indices: Sequence[int], ids: Tensor) -> Tensor:
        """Return where the labels of rows are predicted (rows, tokens), bool."""
        wanted = torch.zeros(ids.shape, dtype=torch.bool)
        for place, row in enumerate(indices):
            end, start = self.suffixes.length(row), self.suffixes.starts[row]
            wanted[place, self.first_labels[row] - start - 1 : end - 1] = True
        return wanted.to(ids.device)

    def _clip(self, active: Sequence[int]) -> None:
        """Clip the gradient of each thing's values to its own norm."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        squares = torch.stack([gradient.square().flatten(1).sum(1).to(gradients[0].device) for gradient in gradients])
        norms = squares.sum(0).sqrt()
        if not torch.isfinite(norms).all():
            self._refuse(norms, "gradient")
        factors = (self.recipe.max_grad_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)
        for gradient in gradients:
            gradient *= factors.to(gradient.device)[:, None, None]

    def _refuse(self, values: Tensor, what: str) -> None:
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise ValueError(
            f"The {what} of {self.things[bad].name!r} is NaN or infinite: lower `learning_rate`, or use the model in "
            "bfloat16 or float32."
        )
