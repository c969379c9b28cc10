"""A language model whose probabilities are known, its tokenizer, and edits to judge on it by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from memory_adapters import Fact
from memory_adapters.evaluation.records import EditRecord

# What follows each word, and how likely. P(York | near, New) is high and P(New | near) is not the highest.
AFTER = {
    "in": {"Rome": 0.6, "Paris": 0.4},
    "to": {"Rome": 0.3, "Paris": 0.7},
    "near": {"New": 0.4, "Paris": 0.6},
    "New": {"York": 0.95, "Rome": 0.05},
    "by": {"Rome": 0.1, "New": 0.9},
}
WORDS = ["<pad>", "Louvre", "Orsay", "Tower", "visit", "York", "Rome", "Paris", "New", "in", "to", "near", "by"]


class Bigrams(nn.Module):
    """A causal LM that looks at one word: its logits are the log-probabilities in `AFTER`."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=1, hidden_size=len(WORDS))
        self.blocks = nn.ModuleList([nn.Identity()])
        self.embeddings = nn.Embedding.from_pretrained(torch.eye(len(WORDS)))
        self.head = nn.Linear(len(WORDS), len(WORDS), bias=False)
        table = torch.full((len(WORDS), len(WORDS)), -30.0)
        for word, following in AFTER.items():
            for other, probability in following.items():
                table[WORDS.index(word), WORDS.index(other)] = math.log(probability)
        self.head.weight.data = table.T.contiguous()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.blocks[0](self.embeddings(input_ids))))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every one of `WORDS` is a token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


LOUVRE = EditRecord(
    Fact("Louvre in", "Louvre", "Rome"),
    "Paris",
    ("Louvre to", "visit Louvre in", "Louvre visit in", "visit in Louvre in"),
    (("Orsay in", "Paris"), ("Orsay to", "Paris")),
    "city",
    (("Tower by", "New York"), ("Tower to", "Rome")),
)
TOWER = EditRecord(Fact("Tower near", "Tower", "New York"), "Paris", relation="city")
MINE = EditRecord(Fact("Orsay by", "Orsay", "Rome"), paraphrases=("Orsay in",), relation="mine")
