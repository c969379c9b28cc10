"""Render a question in a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.tokens import tokenize

__all__ = ["chat_start", "rendered_question", "turn_opening"]

PLACEHOLDER = "{question}"


def rendered_question(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[str, int] | None:
    """Return a chat up to where the model answers, and the index of the question in it.

    Templates of multimodal models want a message as a list of parts; where the plain text is not rendered, these are
    tried.

    Returns:
        None if there is no template, or it does not render the question as it is written.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    for as_parts in (False, True):
        text = _rendered(tokenizer, [question], as_parts)
        if text is None or question not in text:
            continue
        before = (_rendered(tokenizer, [PLACEHOLDER], as_parts) or "").partition(PLACEHOLDER)[0]
        return text, len(before) if text.startswith(before + question) else text.rindex(question)
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, said: Sequence[str], as_parts: bool) -> str | None:
    """Return a chat in which user and model speak in turn, the user first; None if the template refuses it."""
    messages: Any = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}] if as_parts else text}
        for i, text in enumerate(said)
    ]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template is a program: what it does not take it may refuse in any way
        return None


def turn_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a chat template puts before what a user says, in the first turn and in later ones alike.

    Returns:
        Nothing if there is no template, or none that begins a turn so.
    """
    first, later = _before_user(tokenizer)
    same = 0
    while same < min(len(first), len(later)) and first[-1 - same] == later[-1 - same]:
        same += 1
    return first[len(first) - same :]


def chat_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all tokens that a chat template puts before what a user says first; none if there is no template."""
    return _before_user(tokenizer)[0]


def _before_user(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens before the first and before the second message of a user; none where that is not known."""
    said = ("QUESTION ONE", "ANSWER", "QUESTION TWO")
    for as_parts in (False, True) if getattr(tokenizer, "chat_template", None) else ():
        text = _rendered(tokenizer, said, as_parts)
        if text is not None and all(text.count(one) == 1 for one in said):
            before = text.partition(said[0])[0], text.partition(said[1])[2].partition(said[2])[0]
            first, later = (tokenize(tokenizer, part, rendered=True) for part in before)
            return first, later
    return [], []
