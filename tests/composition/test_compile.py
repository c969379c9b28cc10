"""`torch.compile` of generation with an active memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memory_adapters import inject_memory
from tests.support.composing import SUITES
from tests.support.contract import PROMPT, encode
from tests.support.models import byte_tokenizer, tiny_model

CACHES = {"residual": ("dynamic", "static"), "memit": ("dynamic", "static"), "slots": ("dynamic",)}


@pytest.mark.integration
@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "cache"), [(kind, cache) for kind, caches in CACHES.items() for cache in caches])
def test_compiled_generation_is_generation(kind: str, cache: str, architecture: str) -> None:
    torch.compiler.reset()
    model: Any = tiny_model(architecture)
    memory = inject_memory(model, SUITES[kind].make_config(), tokenizer=byte_tokenizer())
    SUITES[kind].fill(memory)
    settings: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
    expected = model.generate(**encode(PROMPT), **settings)
    with memory.disabled():
        assert not torch.equal(model.generate(**encode(PROMPT), **settings), expected)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    compiled = model.generate(**encode(PROMPT), **settings, cache_implementation=None if cache == "dynamic" else cache)
    assert torch.equal(compiled, expected)


def test_slots_refuse_a_static_cache() -> None:
    model: Any = tiny_model()
    memory = inject_memory(model, SUITES["slots"].make_config(), tokenizer=byte_tokenizer())
    SUITES["slots"].fill(memory)
    with pytest.raises(ValueError, match="is a static cache"):
        model.generate(**encode(PROMPT), max_new_tokens=4, do_sample=False, cache_implementation="static")
