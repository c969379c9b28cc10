"""Names that stand in rows of tokens, and gates that open at them."""

import torch

from memory_adapters.keys.gate import KeySet
from memory_adapters.keys.spellings import Spellings


def test_names_are_found_where_they_stand_in_full() -> None:
    spellings = Spellings([(0, [5, 6]), (1, [6]), (2, [5, 6, 7]), (3, [])])
    assert list(spellings.found([5, 6, 7, 6])) == [(0, 0, 1), (1, 1, 1), (2, 0, 2), (1, 3, 3)]
    assert not list(spellings.found([7, 5]))


def test_gate_opens_at_a_name_of_several_tokens_whatever_its_keys_say() -> None:
    keys = KeySet(4, [0, 1], [[[5, 6]], [[8]]], [3, 3], held=True)
    keys.add(torch.zeros(0, 4), torch.zeros(0), [], [], [])
    keys.key_bias -= 1  # no key is near anything
    ids = torch.tensor([[9, 5, 6, 8], [6, 5, 8, 9]])
    opened = keys.opened(torch.randn(2, 4, 4), ids)
    assert opened.things.tolist() == [0]  # a name of one token may be an ordinary word
    assert opened.mask[..., 0].tolist() == [[False, False, True, False], [False] * 4]
    masked = keys.opened(torch.randn(2, 4, 4), ids, torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]]))
    assert masked.things.tolist() == []
    keys.keep([1])
    assert keys.opened(torch.randn(2, 4, 4), ids).things.tolist() == []
