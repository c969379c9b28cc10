"""Blocks, embeddings and head are found from structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from memory_adapters import MemoryAdapterConfig, inject_memory, memories
from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.modes import generating
from memory_adapters.base_model.partial_forward import capture, logits_at
from tests.support.contract import architectures, encode, logits
from tests.support.models import byte_tokenizer, tiny_model


@architectures
def test_parts(architecture: str) -> None:
    model = tiny_model(architecture)
    decoder = find_decoder(model)
    assert decoder.num_layers == 4
    assert decoder.hidden_size == 32
    assert model.get_submodule(decoder.block_name(2)) is decoder.blocks[2]
    hidden = model(**encode("Rome"), output_hidden_states=True).hidden_states
    for state, expected in zip(capture(model, decoder, [0, 2], **encode("Rome")), (hidden[1], hidden[3]), strict=True):
        assert torch.equal(state, expected)


@architectures
def test_logits_only_where_asked(architecture: str) -> None:
    model = tiny_model(architecture)
    inputs = encode("The Eiffel Tower", "Rome")
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[0, 3] = mask[1, 1] = mask[1, 2] = True
    everywhere = model(**inputs).logits
    with logits_at(find_decoder(model), mask):
        some = model(**inputs).logits
    torch.testing.assert_close(some[0], everywhere[mask])
    assert torch.equal(model(**inputs).logits, everywhere)


def test_unknown_structure_names_the_field_to_set() -> None:
    model = tiny_model()
    before = logits(model)
    model.extra = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(ValueError, match=r"Set `layers_path`.*'model.layers'.*'extra'"):
        inject_memory(model, MemoryAdapterConfig(), tokenizer=byte_tokenizer())
    assert not memories(model)
    inject_memory(model, MemoryAdapterConfig(layers_path="model.layers"), tokenizer=byte_tokenizer())
    assert torch.equal(logits(model), before)
    for path in ("model.nothing", "model.norm"):
        with pytest.raises(ValueError, match="layers_path"):
            find_decoder(model, path)


def test_not_a_language_model() -> None:
    with pytest.raises(ValueError, match="layers_path"):
        find_decoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="causal LM head"):
        find_decoder(tiny_model().model)


@torch.no_grad()
def test_generating_gives_the_head_contiguous_states() -> None:
    model: Any = tiny_model()
    head, seen = model.get_output_embeddings(), []
    model.train()
    with generating(model):
        head.register_forward_pre_hook(lambda _head, given: seen.append(given[0].is_contiguous()))
        model.generate(torch.ones(2, 3, dtype=torch.long), max_new_tokens=2, pad_token_id=0)
        assert not model.training
    assert seen == [True, True]
    assert model.training
    assert len(head._forward_pre_hooks) == 1, "the test's own"
