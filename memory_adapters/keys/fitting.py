"""Find the keys of items, for all methods: from the model's own states where what is written is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.chat import rendered_question
from memory_adapters.base_model.decoder import Decoder
from memory_adapters.base_model.item_rows import Row
from memory_adapters.base_model.sampling import OTHER_SUBJECTS, PLAIN_QUESTIONS, PLAIN_SENTENCES
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.items import Document, Fact, Item
from memory_adapters.keys.keys import StreamStatistics, covering_keys, gate_parameters, normalized, select_keys
from memory_adapters.training.stored_states import row_states

__all__ = ["BlockKeys", "fit_keys", "unrelated_rows"]


@dataclass(frozen=True)
class BlockKeys:
    """Store the keys of one block, scaled as a gate reads them; see `gate_parameters`.

    Attributes:
        weights: (keys, hidden_size), float32.
        bias: (keys,), float32.
        owners: For each key, the index of the item in which it was found.
    """

    weights: Tensor
    bias: Tensor
    owners: list[int]


def unrelated_rows(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, *, chat: bool
) -> list[list[int]]:
    """Return rows of tokens on which keys must stay closed: unrelated text, and what is written about other subjects.

    Args:
        items: What is written.
        tokenizer: The model's tokenizer.
        texts: Texts that have nothing to do with the items.
        max_length: Longest row in tokens.
        chat: Whether to add questions about other things in the chat template, if there is one.

    Raises:
        ValueError: If there are fewer than 2 usable texts.
    """
    rows = [tokenize(tokenizer, text)[:max_length] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if len(rows) < 2:
        raise ValueError(f"`unrelated` has {len(rows)} usable texts; give at least 2 of several words each.")
    facts = [item for item in items if isinstance(item, Fact)]
    names = [name for name in OTHER_SUBJECTS if name not in {fact.subject for fact in facts}]
    others = [fact.about(names[i % len(names)]) for i, fact in enumerate(facts)]
    rows += [tokenize(tokenizer, text)[:max_length] for text in (*PLAIN_SENTENCES, *others)]
    if chat:
        asked = [
            *PLAIN_SENTENCES,
            *PLAIN_QUESTIONS,
            *(f"Tell me about {name}." for name in names),
            *others[: len(names)],
        ]
        rendered = [rendered_question(tokenizer, question) for question in asked]
        rows += [tokenize(tokenizer, one[0], rendered=True)[:max_length] for one in rendered if one is not None]
    return rows


def fit_keys(
    model: PreTrainedModel,
    decoder: Decoder,
    layers: Sequence[int],
    items: Sequence[Item],
    rows: Sequence[tuple[int, Row]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str,
    unrelated: Sequence[Sequence[int]],
    threshold: float,
    ramp: float,
) -> tuple[list[BlockKeys], list[str]]:
    """Find keys that open at what items are about, and stay closed on unrelated text.

    A fact's key is its subject's mean state, and each of its states that the keys before do not open; documents and
    questions get those of their tokens that are unlike unrelated text.

    Args:
        model: The causal LM, with the memory that the keys are for disabled.
        decoder: Its parts.
        layers: Blocks whose outputs the keys are compared with.
        items: What is written.
        rows: The items' rows, each with the index of its item; `key_positions` are the tokens that may become keys.
        tokenizer: The model's tokenizer.
        prefix: Text behind which a subject's last word alone is read, for what a key must not open on.
        unrelated: Rows of tokens.
        threshold: Similarity to a key below which a gate is closed.
        ramp: How far above it a gate is fully open.

    Returns:
        The keys of each block, and notes on what stays shut and on what leaks.
    """
    words = [
        (index, tokenize(tokenizer, f"{prefix.rstrip('. ')} {item.subject.split()[-1]}"))
        for index, item in enumerate(items)
        if isinstance(item, Fact) and len(item.subject.split()) > 1 and prefix
    ]
    states_of = {
        "unrelated": row_states(model, decoder, layers, unrelated),
        "written": row_states(model, decoder, layers, [row.input_ids for _, row in rows]),
        "words": row_states(model, decoder, layers, [ids for _, ids in words]),
    }
    found: list[BlockKeys] = []
    notes: list[str] = []
    for position, layer in enumerate(layers):
        statistics = StreamStatistics.fit(torch.cat([states[position] for states in states_of["unrelated"]]))
        own: list[list[Tensor]] = [[] for _ in items]
        named: list[list[Tensor]] = [[] for _ in items]  # with the subject's own name alone
        for (index, row), states in zip(rows, states_of["written"], strict=True):
            here = normalized(states[position][row.key_positions])
            own[index].append(here)
            if not row.by_other_name:
                named[index].append(here)
        last_words = {i: normalized(s[position][-1]) for (i, _), s in zip(words, states_of["words"], strict=True)}
        keys = [statistics.mean.new_zeros(0, decoder.hidden_size)]
        avoided = [keys[0]]
        owners: list[int] = []
        shut: list[int] = []
        for index, item in enumerate(items):
            if isinstance(item, Fact):
                last_word = last_words.get(index, statistics.mean)
                mean = torch.cat(named[index]).mean(0, keepdim=True)
                settings = {"threshold": threshold, "ramp": ramp}
                chosen, closed = covering_keys(statistics, mean, torch.cat(own[index]), last_word, **settings)
                keys.append(chosen)
                avoided.append(last_word.expand_as(chosen))
                owners += [index] * len(chosen)
                shut += [index] if closed.any() else []
        rest = [index for index, item in enumerate(items) if not isinstance(item, Fact)]
        if rest:
            tokens = torch.cat([torch.cat(own[index]) for index in rest])
            of_token = [index for index in rest for part in own[index] for _ in part]
            selected = select_keys(statistics, tokens, threshold=threshold, ramp=ramp)
            keys.append(tokens[selected])
            avoided.append(statistics.mean.expand_as(keys[-1]))
            owners += [of_token[i] for i in selected.tolist()]
            directions = statistics.directions(torch.cat(keys), torch.cat(avoided))
            for index in rest:
                near = (torch.cat(own[index]) - statistics.mean) @ directions.T
                shut += [index] if not len(directions) or near.max() < threshold else []
        if shut:
            first = items[shut[0]]
            what = first.text[:40] if isinstance(first, Document) else first.prompt
            notes.append(
                f"at block {layer} the memory stays shut, or opens in part, in some text of {len(shut)} of "
                f"{len(items)} items (first: {what!r}): their states there are like those of unrelated text"
            )
        every = torch.cat(keys)
        weights, bias, leaky = gate_parameters(statistics, every, torch.cat(avoided), threshold=threshold, ramp=ramp)
        if leaks := int(leaky.sum()):
            notes.append(f"{leaks} of {len(every)} keys also open on some unrelated text at block {layer}")
        found.append(BlockKeys(weights, bias, owners))
    return found, notes
