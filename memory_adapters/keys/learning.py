"""Learn where things are named: their keys, and from which token on their values act in the rows that train them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import Decoder, context_length
from memory_adapters.base_model.item_rows import Row, chat_row
from memory_adapters.base_model.sampling import PLAIN_QUESTIONS, PLAIN_SENTENCES, sample_text
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.items import Document, QuestionAnswer
from memory_adapters.keys.common_words import common_word_notes
from memory_adapters.keys.fitting import fit_keys, unrelated_rows
from memory_adapters.keys.gate import KeySet
from memory_adapters.keys.thing_config import ThingConfig
from memory_adapters.keys.things import (
    Thing,
    key_rows,
    keys_at_thing,
    rendered,
    spelling_ids,
    terms_of,
    thing_rows,
    words_in,
)
from memory_adapters.memory import Memory
from memory_adapters.training.phrasings import other_questions
from memory_adapters.training.rows import make_prefixes
from memory_adapters.training.stored_states import row_states
from memory_adapters.training.thing_trainer import OTHER, ThingRows

__all__ = ["LearnedKeys", "learn_keys", "longest_row"]

NUM_PASSING, PASSING_TOKENS = 2, 32  # of the texts that go on as they would
RAMP = 0.1  # scale of a gate's slope, which is only read above or below 0


@dataclass(frozen=True)
class LearnedKeys:
    """Store the keys of things, in their order.

    Attributes:
        keys: Keys (keys, hidden_size), float32.
        bias: Their biases (keys,).
        owners: For each key, the index of its thing.
        names: For each thing, the token ids of its spellings.
        windows: For each thing, over how many tokens more these may be spread.
        notes: What the user should know.
    """

    keys: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    bias: Tensor = field(default_factory=lambda: torch.zeros(0))
    owners: list[int] = field(default_factory=list)
    names: list[list[list[int]]] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def longest_row(memory: Memory[Any]) -> int:
    """Return how many tokens a training row may have."""
    limit = context_length(memory.model)
    return min(limit, memory.config.max_length or limit)


def learn_keys(
    memory: Memory[Any], decoder: Decoder, things: Sequence[Thing], *, unrelated: Sequence[str] | None, progress: bool
) -> tuple[LearnedKeys, list[ThingRows]]:
    """Find the keys of things, and the rows that train their values.

    Args:
        memory: The memory, whose config is a `ThingConfig`; it is disabled meanwhile.
        decoder: Parts of its model.
        things: What is written about.
        unrelated: Texts that have nothing to do with them; sampled from the model if None.
        progress: Whether to show a bar.
    """
    config: ThingConfig = memory.config
    model, tokenizer, longest = memory.model, memory._require_tokenizer(), longest_row(memory)
    with memory.disabled():
        texts = list(unrelated) if unrelated is not None else _sampled(memory, config.seed)
        prefixes = make_prefixes(texts, config.num_prefixes, config.seed)
        settings: dict[str, Any] = dict(prefixes=prefixes, max_length=longest, rephrase=config.phrasings)
        common = words_in([*texts, *PLAIN_SENTENCES, *PLAIN_QUESTIONS])
        terms = [[] if thing.spellings else terms_of(thing, common) for thing in things]
        rows = [thing_rows(thing, own, tokenizer, **settings) for thing, own in zip(things, terms, strict=True)]
        with_keys = [
            (index, row)
            for index, (thing, own) in enumerate(zip(things, rows, strict=True))
            for row in (*own, *key_rows(thing, tokenizer))
            if row.key_positions
        ]
        listed = tqdm(things, desc="sampling", unit="thing", disable=not progress)
        others = [_other_rows(memory, thing, longest, texts) for thing in listed]
        items = [thing.named_item for thing in things]
        (keys,), notes = fit_keys(
            model,
            decoder,
            [config.block],
            items,
            with_keys,
            tokenizer,
            prefix=next(iter(prefixes), ""),
            unrelated=unrelated_rows(items, tokenizer, texts, longest, chat=True),
            threshold=config.key_threshold,
            ramp=RAMP,
        )
        named = [spelling_ids(thing, own, tokenizer) for thing, own in zip(things, terms, strict=True)]
        names, windows = [ids for ids, _ in named], [window for _, window in named]
        gate = KeySet(decoder.hidden_size, [], [], [], held=True)
        gate.add(keys.weights, keys.bias, keys.owners, names, windows)
        subjects = {index: thing.name for index, thing in enumerate(things) if thing.spellings}
        notes += common_word_notes(model, decoder, config.block, gate, subjects, tokenizer)
        trained = _with_starts(
            memory, decoder, config.block, gate, things, [[*own, *more] for own, more in zip(rows, others, strict=True)]
        )
    return LearnedKeys(keys.weights, keys.bias, keys.owners, names, windows, notes), trained


def _other_rows(memory: Memory[Any], thing: Thing, longest: int, texts: Sequence[str]) -> list[Row]:
    """Return questions about a thing that nothing written answers, with the beginning of an answer, and plain text.

    What the base model would say at each of these tokens is kept: "X is a" stands for all that an answer may begin
    with. Text that names the thing in passing goes on as it would.
    """
    config, tokenizer = memory.config, memory._require_tokenizer()
    items = [item for item in thing.items if not isinstance(item, Document)]
    if not thing.spellings or len(items) < len(thing.items):
        return []  # a document may answer any question
    name = thing.spellings[0]
    asked = other_questions(name, items, config.num_others, config.seed)
    rows = rendered(chat_row(QuestionAnswer(question, f"{name} is a"), tokenizer) for question in asked)
    passing = random.Random(f"{config.seed} {name}").sample(texts, min(NUM_PASSING if asked else 0, len(texts)))
    rows += [_passing_row(name, text, tokenizer) for text in passing]
    return [replace(keys_at_thing(row, thing, tokenizer), item=OTHER) for row in rows if len(row.input_ids) <= longest]


def _passing_row(name: str, text: str, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return plain text behind a sentence that names a thing."""
    ids = tokenize(tokenizer, f"{name} was in the news again.")
    text_ids = tokenize(tokenizer, f" {text}", rendered=True)[:PASSING_TOKENS]
    return Row([*ids, *text_ids], first_label=len(ids), key_positions=[], context=[])


def _with_starts(
    memory: Memory[Any],
    decoder: Decoder,
    block: int,
    gate: KeySet,
    things: Sequence[Thing],
    rows: Sequence[Sequence[Row]],
) -> list[ThingRows]:
    """Return rows with the tokens from which on their thing's values act: where its gate opens, else at its name."""
    every = [row for own in rows for row in own]
    states = row_states(memory.model, decoder, [block], [row.input_ids for row in every])
    found, place = [], 0
    for index, (thing, own) in enumerate(zip(things, rows, strict=True)):
        starts, firsts = [], []
        for row, (state,) in zip(own, states[place : place + len(own)], strict=True):
            opened = gate.opened(state[None], torch.tensor([row.input_ids]))
            mine = opened.mask[0, :, opened.things == index].any(-1).nonzero().flatten().tolist()
            before = min(row.first_label, len(row.input_ids) - 1) - (0 if row.is_document else 1)
            start = mine[0] if mine else min(row.key_positions, default=before)
            starts.append(min(start, len(row.input_ids) - 2) if row.is_document else min(start, before))
            firsts.append(max(row.first_label, starts[-1] + 1))
        place += len(own)
        found.append(ThingRows(thing.name, [row.input_ids for row in own], starts, firsts, [row.item for row in own]))
    return found


def _sampled(memory: Memory[Any], seed: int) -> list[str]:
    texts = sample_text(memory.model, memory._require_tokenizer(), [""] * 24, num_tokens=64, seed=seed)
    return [text for text in texts if text.strip()]
