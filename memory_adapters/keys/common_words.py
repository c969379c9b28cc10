"""Warn of subjects that ordinary text is full of: words such as "apple", and single letters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import Decoder
from memory_adapters.base_model.names import is_common_word
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.keys.gate import KeySet
from memory_adapters.training.stored_states import row_states
from memory_adapters.validation import shown

__all__ = ["common_word_notes"]

_SENTENCES = (
    "Most people like {}.", "There is {} in the kitchen.", "She said that {} was enough.", "Is {} good for you?",
    "He talked about {} all day long.", "They have never thought of {} before.", "We had {} and some bread for lunch.",
    "{} is what everybody knows.", "{} was there before, and nobody cared.", "The word {} has several meanings.",
)  # fmt: skip


def common_word_notes(
    model: PreTrainedModel,
    decoder: Decoder,
    layer: int,
    gate: KeySet,
    subjects: Mapping[int, str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """Return a note for each subject that is a common word and opens the memory in sentences that use it as such.

    Args:
        model: The causal LM, with the memory disabled.
        decoder: Its parts.
        layer: The block that keys are compared with.
        gate: The keys.
        subjects: Names of things, by their index in the gate.
        tokenizer: The model's tokenizer.
    """
    notes = []
    for thing, name in subjects.items():
        if not is_common_word(name, tokenizer):
            continue
        used = [text.format(name.lower()) for text in _SENTENCES]
        rows = [tokenize(tokenizer, text[0].upper() + text[1:]) for text in used]
        states = row_states(model, decoder, [layer], rows)
        opened = [
            thing in gate.opened(state[None], torch.tensor([row])).things.tolist()
            for row, (state,) in zip(rows, states, strict=True)
        ]
        if count := sum(opened):
            notes.append(
                f"{shown(name)} is a common word: the memory opens in {count} of {len(rows)} ordinary sentences that "
                "have it. Give its subject a longer name, such as one with its kind."
            )
    return notes
