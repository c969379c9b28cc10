"""What a model answers to what was written: without the memory, and with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from memory_adapters.base_model.decoder import execution_device, find_decoder
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.tokens import pad_rows, tokenize
from memory_adapters.items import Document, Fact, Item

if TYPE_CHECKING:
    from memory_adapters.memory import Memory

__all__ = ["answers_to"]

MOST_PROMPTS = 4
PROMPT_TOKENS = 256  # longer prompts would fill the model card
ANSWER_TOKENS = 12


def answers_to(memory: Memory, items: Sequence[Item], *, taken: int = 0) -> list[dict[str, str]]:
    """Greedy answers to the prompts of the facts and questions written last, without the memory and with it.

    Prompts that the config keeps from earlier writes are asked again: a later write may have changed what is said.
    Nothing about the model or the memory changes.

    Args:
        memory: It has just written `items`; it takes part in its own answers whether or not it is active.
        items: What was written. Documents have no prompt.
        taken: Positions of the model that are not free for prompts.

    Returns:
        At most 4 of `prompt`, `before` and `after`; none if all adapters of the model are switched off. A prompt of
        over 256 tokens, or that does not fit in the model's positions, is left out.
    """
    model, tokenizer = memory.model, memory.tokenizer
    if any(layer.disable_adapters for layer in memory.tuner_layers()):
        return []
    asked = [x.prompt if isinstance(x, Fact) else x.question for x in items if not isinstance(x, Document)]
    kept = [answer["prompt"] for answer in memory.config.answers if answer["prompt"] not in asked]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    longest = min(PROMPT_TOKENS, positions - taken - ANSWER_TOKENS)
    rows = {prompt: tokenize(tokenizer, prompt) for prompt in dict.fromkeys([*kept, *asked[-MOST_PROMPTS:]])}
    prompts = [prompt for prompt, row in rows.items() if 0 < len(row) <= longest][-MOST_PROMPTS:]
    if not prompts:
        return []
    device = execution_device(find_decoder(model, memory.config.layers_path).embeddings)
    was_active = memory.active
    if not was_active:
        memory.active = True
    try:
        with evaluating(model):
            after = _greedy(model, tokenizer, [rows[prompt] for prompt in prompts], device)
            with memory.disabled():
                before = _greedy(model, tokenizer, [rows[prompt] for prompt in prompts], device)
    finally:
        if not was_active:
            memory.active = False
    return [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)]


@torch.no_grad()
def _greedy(model: Any, tokenizer: Any, rows: Sequence[list[int]], device: torch.device) -> list[str]:
    """Greedy continuations of rows of token ids, in one batch with padding on the left."""
    backwards = pad_rows([row[::-1] for row in rows], device)
    inputs = {name: tensor.flip(1) for name, tensor in backwards.items()}
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    ids = model.generate(
        **inputs,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=next(pad for pad in pads if pad is not None),
    )
    return list(tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
