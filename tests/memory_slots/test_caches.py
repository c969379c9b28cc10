"""Caches behind slots: whoever continues one counts the tokens of the prompt, and goes on as from the start."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from memory_adapters.base_model.partial_forward import CACHE
from tests.memory_slots.test_slots import TEXT, memory_on
from tests.support.contract import encode
from tests.support.models import tiny_model

GREEDY: dict[str, Any] = dict(max_new_tokens=8, do_sample=False)


def written(architecture: str = "llama") -> Any:
    model = tiny_model(architecture)
    memory_on(model).write(TEXT, progress=False)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "lfm2", "gemma3"])
@pytest.mark.parametrize("new", ["?", " and Lyon is in"])
def test_a_second_turn_with_the_returned_cache(architecture: str, new: str) -> None:
    model = written(architecture)
    first = model.generate(**encode("The Eiffel Tower is in"), **GREEDY, return_dict_in_generate=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == first.sequences.shape[1] - 1  # the last token was not read yet
    turn = torch.cat([first.sequences, encode(new)["input_ids"]], 1)
    read: list[int] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: read.append(args[0].shape[1]))
    continued = model.generate(
        turn, attention_mask=torch.ones_like(turn), past_key_values=copy.deepcopy(cache), **GREEDY
    )
    handle.remove()
    assert read[0] == len(encode(new)["input_ids"][0]) + 1
    assert torch.equal(continued, model.generate(turn, attention_mask=torch.ones_like(turn), **GREEDY))
    assert cache.get_seq_length() == first.sequences.shape[1] - 1  # the copy was continued, not this one


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_pass_by_hand_continues_one(architecture: str) -> None:
    model = written(architecture)
    ids = encode("Rome is old")["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        out = model(input_ids=ids[:, :4])
        assert out[CACHE].get_seq_length() == 4
        rest = model(input_ids=ids[:, 4:], **{CACHE: out[CACHE]})
        assert rest[CACHE].get_seq_length() == ids.shape[1]
    torch.testing.assert_close(torch.cat([out.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)
    rest[CACHE].crop(-2) if hasattr(rest[CACHE], "crop") else None
    rest[CACHE].reset()
    assert rest[CACHE].get_seq_length() == 0


def test_a_padded_pass_without_positions_is_the_prompt_alone() -> None:
    model = written()
    with torch.no_grad():
        alone = model(**encode("Rome is old")).logits[0]
        padded = model(**encode("Rome is old", "The Eiffel Tower is in the city", side="left")).logits[0]
    torch.testing.assert_close(padded[-len(alone) :], alone, rtol=1e-4, atol=1e-4)


def test_spans_that_do_not_fit_in_the_models_positions_are_named() -> None:
    memory = memory_on(tiny_model(), num_slots=128, span_length=512)
    with pytest.raises(ValueError, match=r"`span_length=512` and `num_slots=128`.*the model has 512"):
        memory.write("text " * 200, progress=False)
    assert not memory.slots


@pytest.mark.integration
def test_continuous_batching_says_what_it_cannot() -> None:
    model = written()
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    results = model.generate_batch([encode("Rome is")["input_ids"][0].tolist()], generation_config=config)
    assert all("use `generate`" in result.error for result in results.values())
