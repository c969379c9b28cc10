"""Render a question in a tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["rendered_question"]

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
        text = _rendered(tokenizer, question, as_parts)
        if text is None or question not in text:
            continue
        before = (_rendered(tokenizer, PLACEHOLDER, as_parts) or "").partition(PLACEHOLDER)[0]
        return text, len(before) if text.startswith(before + question) else text.rindex(question)
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, question: str, as_parts: bool) -> str | None:
    content = [{"type": "text", "text": question}] if as_parts else question
    message: Any = [{"role": "user", "content": content}]
    try:
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template is a program: what it does not take it may refuse in any way
        return None
