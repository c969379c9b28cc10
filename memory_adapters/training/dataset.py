"""Serve training rows as a dataset, in batches and in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from memory_adapters.base_model.item_rows import IGNORED, Row
from memory_adapters.base_model.tokens import pad_rows
from memory_adapters.training.rows import TrainingTurn

__all__ = ["FilledSampler", "Teacher", "TurnDataset", "collate"]


@dataclass(frozen=True)
class Teacher:
    """Store the base model's likeliest tokens at a row's labels, with the item in its context or without.

    Attributes:
        ids: (labels, k).
        log_probs: (labels, k).
    """

    ids: Tensor
    log_probs: Tensor


class TurnDataset(Dataset):
    """Serve one example a turn; which of the turn's rows it is depends on the epoch.

    Args:
        turns: The turns.
        states: Stored state of every row of all turns, in order; None to run the whole model.
        teachers: Teacher of every row, or None for a row without one.
    """

    def __init__(
        self, turns: Sequence[TrainingTurn], states: Sequence[Tensor] | None, teachers: Sequence[Teacher | None]
    ) -> None:
        self.examples: list[list[dict[str, Any]]] = []
        position = 0
        for turn in turns:
            variants = []
            for row in turn.rows:
                state = None if states is None else states[position]
                teacher, kept = teachers[position], turn.kind == "locality"
                variants.append({"row": row, "state": state, "teacher": teacher, "kept": kept})
                position += 1
            self.examples.append(variants)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the rows of an epoch; accelerate's data loader calls this at its start."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return example `index`; for `FilledSampler.FILLER` one that teaches nothing."""
        variants = self.examples[max(index, 0)]
        example = variants[self.epoch % len(variants)]
        if index >= 0:
            return example
        row = replace(example["row"], first_label=len(example["row"].input_ids))
        return {**example, "row": row, "teacher": None, "kept": False}


class FilledSampler(Sampler[int]):
    """Go through a dataset in the order of a single process, then through fillers up to a multiple of the batch.

    Several processes then get the batches that a single one would, where accelerate would repeat the first examples.

    Args:
        dataset: The dataset.
        batch: Examples in a batch of all processes together.
    """

    FILLER = -1

    def __init__(self, dataset: TurnDataset, batch: int) -> None:
        self.dataset = dataset
        self.order = SeedableRandomSampler(dataset)
        self.fillers = -len(dataset) % batch

    def __len__(self) -> int:
        return len(self.order) + self.fillers

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the order and of the dataset, which accelerate's data loader does not reach then."""
        self.order.set_epoch(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from [self.FILLER] * self.fillers


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad examples of `TurnDataset` on the right.

    Returns:
        `input_ids`, `attention_mask`, `labels` (batch, tokens); `states` (batch, tokens, hidden_size) if stored; for
        every label in order, `kept` (whether it belongs to a locality row), and `teacher_ids` and
        `teacher_log_probs` (labels, k), with log-probabilities of −inf where there is no teacher.
    """
    rows: list[Row] = [example["row"] for example in examples]
    batch = pad_rows([row.input_ids for row in rows])
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    for i, row in enumerate(rows):
        batch["labels"][i, : len(row.labels)] = torch.tensor(row.labels)
    if examples[0]["state"] is not None:
        batch["states"] = nn.utils.rnn.pad_sequence([example["state"] for example in examples], batch_first=True)
    counts = [len(row.input_ids) - row.first_label for row in rows]
    batch["kept"] = torch.cat([torch.full((n,), bool(e["kept"])) for n, e in zip(counts, examples, strict=True)])
    taught = next((example["teacher"] for example in examples if example["teacher"] is not None), None)
    if taught is not None:
        k = taught.ids.shape[-1]
        none = [Teacher(torch.zeros(n, k, dtype=torch.long), torch.full((n, k), -torch.inf)) for n in counts]
        teachers = [example["teacher"] or blank for example, blank in zip(examples, none, strict=True)]
        batch["teacher_ids"] = torch.cat([teacher.ids for teacher in teachers])
        batch["teacher_log_probs"] = torch.cat([teacher.log_probs for teacher in teachers])
    return batch
