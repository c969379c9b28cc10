"""Rows on which a residual memory must answer as the base model does."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.item_rows import Row
from memory_adapters.base_model.tokens import last_token_of, tokenize
from memory_adapters.items import Fact, Item
from memory_adapters.training.rows import TrainingTurn


def locality_turns(
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    continuations: Sequence[str],
    unrelated: Sequence[list[int]],
) -> list[TrainingTurn]:
    """Return turns on which the memory must answer as the base does, one for each item.

    Args:
        items: What is written.
        tokenizer: The model's tokenizer.
        continuations: Texts in which the base continues each fact's subject, in turns, as many for each.
        unrelated: Rows of tokens that have nothing to do with the items.
    """
    facts = [i for i, item in enumerate(items) if isinstance(item, Fact)]
    turns = []
    for index, item in enumerate(items):
        rows = []
        if isinstance(item, Fact):
            for text in continuations[facts.index(index) :: len(facts)]:
                ids = tokenize(tokenizer, text)
                end = text.index(item.subject) + len(item.subject)
                rows.append(Row(ids, last_token_of(tokenizer, text, end, ids) + 1, [], []))
        rows.append(Row(unrelated[index % len(unrelated)], 1, [], []))
        turns.append(TrainingTurn("locality", index, [row for row in rows if row.first_label < len(row.input_ids)]))
    return turns
