"""Rows that are run from one token of each on give what they give when they are read whole."""

from __future__ import annotations

import pytest
import torch

from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.training.row_suffixes import RowSuffixes
from tests.support.models import ARCHITECTURES, tiny_model

ROWS = [[5, 6, 7, 8, 9], [5, 6, 7, 3, 2, 11, 12, 4], [9, 8, 7], [5, 6, 1]]
STARTS = [3, 3, 0, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_suffixes_give_the_logits_of_whole_rows(architecture: str) -> None:
    model = tiny_model(architecture)
    decoder = find_decoder(model)
    suffixes = RowSuffixes(model, decoder, 1, ROWS, STARTS)
    assert suffixes.whole or len(suffixes.kept) == 2  # what rows begin with is read once
    for indices in ([0, 1, 2, 3], [2], [3, 0], [1]):
        batch = suffixes.batch(indices)
        with suffixes.resume(batch):
            logits = model(**batch.inputs).logits
        for place, i in enumerate(indices):
            start = STARTS[i] - batch.offsets[place]
            whole = model(input_ids=torch.tensor([ROWS[i]])).logits[0, start:]
            torch.testing.assert_close(logits[place, : suffixes.length(i)], whole, rtol=1e-4, atol=1e-4)


def test_rows_longer_than_the_attention_looks_back_are_read_whole() -> None:
    model = tiny_model()
    model.config.sliding_window = 6
    suffixes = RowSuffixes(model, find_decoder(model), 1, ROWS, STARTS)
    assert suffixes.whole
    assert suffixes.starts == [0, 0, 0, 0]
    assert suffixes.batch([1, 0]).offsets == [3, 3]
