"""Write a gated LoRA: tell what items are about, find keys, train a LoRA for each thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memory_adapters.base_model.decoder import Decoder, context_length, find_decoder
from memory_adapters.base_model.item_rows import Row
from memory_adapters.base_model.sampling import PLAIN_QUESTIONS, PLAIN_SENTENCES, sample_text
from memory_adapters.base_model.seeding import seeded
from memory_adapters.gated_lora.config import GatedLoraConfig
from memory_adapters.gated_lora.layer import Factors
from memory_adapters.gated_lora.prompts import thing_rows
from memory_adapters.gated_lora.train import ThingRows, train
from memory_adapters.keys.fitting import fit_keys, unrelated_rows
from memory_adapters.keys.gate import KeySet
from memory_adapters.keys.things import Thing, key_rows, spelling_ids, terms_of, words_in
from memory_adapters.memory import Memory
from memory_adapters.training.rows import make_prefixes
from memory_adapters.training.stored_states import row_states

__all__ = ["Learned", "learn", "longest_row"]

RAMP = 0.1  # scale of a gate's slope, which is only read above or below 0


@dataclass(frozen=True)
class Learned:
    """Store what was learned of things, in their order.

    Attributes:
        keys: Keys (keys, hidden_size), float32.
        bias: Their biases (keys,).
        owners: For each key, the index of its thing.
        names: For each thing, the token ids of its spellings.
        windows: For each thing, over how many tokens more these may be spread.
        factors: Their LoRAs, by matrix.
        losses: Mean loss of each pass.
        notes: What the user should know.
    """

    keys: Tensor
    bias: Tensor
    owners: list[int]
    names: list[list[list[int]]]
    windows: list[int]
    factors: dict[str, Factors]
    losses: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def nothing(cls) -> Learned:
        """Return what is learned of no thing."""
        return cls(torch.zeros(0, 0), torch.zeros(0), [], [], [], {})


def longest_row(memory: Memory[GatedLoraConfig]) -> int:
    """Return how many tokens a training row may have."""
    limit = context_length(memory.model)
    return min(limit, memory.config.max_length or limit)


def learn(
    memory: Memory[GatedLoraConfig], things: Sequence[Thing], *, unrelated: Sequence[str] | None, progress: bool
) -> Learned:
    """Find the keys of things, and train a LoRA for each."""
    config, model, tokenizer = memory.config, memory.model, memory._require_tokenizer()
    decoder = find_decoder(model, config.layers_path)
    longest = longest_row(memory)
    with seeded(config.seed):
        with memory.disabled():
            texts = list(unrelated) if unrelated is not None else _sampled(memory)
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
            trained = _with_starts(memory, decoder, gate, things, rows)
        factors, losses = train(memory, decoder, trained, progress=progress)
    return Learned(keys.weights, keys.bias, keys.owners, names, windows, factors, losses, notes)


def _with_starts(
    memory: Memory[GatedLoraConfig],
    decoder: Decoder,
    gate: KeySet,
    things: Sequence[Thing],
    rows: Sequence[Sequence[Row]],
) -> list[ThingRows]:
    """Return rows with the tokens from which on their thing's LoRA acts: where its gate opens, else at its name."""
    every = [row for own in rows for row in own]
    states = row_states(memory.model, decoder, [memory.config.block], [row.input_ids for row in every])
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


def _sampled(memory: Memory[GatedLoraConfig]) -> list[str]:
    texts = sample_text(memory.model, memory._require_tokenizer(), [""] * 24, num_tokens=64, seed=memory.config.seed)
    return [text for text in texts if text.strip()]
