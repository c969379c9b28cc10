"""Question answering from slots, as SQuAD scores it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.modes import generating
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.memory_slots import SlotMemory
from memory_adapters.memory_slots.reconstruction import Reading, check_lengths

__all__ = ["answer_scores", "question_prompt", "score_answers"]

QUESTION = "Answer the question from the text above, in as few words as possible.\nQuestion: {question}"


def score_answers(
    memory: SlotMemory,
    questions: Sequence[tuple[str, str]],
    slots: Reading,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, float]:
    """Score the first line of greedy answers: F1, exact match, and whether the wanted answer is contained.

    All are means over questions in [0, 1], with SQuAD's normalisation.


    Args:
        memory: A memory with a tokenizer; what it reads is put back afterwards.
        questions: (question, answer).
        slots: What is read before each question: one of `ways_to_read`.
        prompt: Holds `{question}`; by default `question_prompt(memory.tokenizer)`.
        max_new_tokens: Of an answer.
        batch_size: Questions answered together.
        progress: Show a bar.
    """
    check_lengths(questions, slots)
    tokenizer, before = memory._require_tokenizer(), memory.slots
    asking = question_prompt(tokenizer) if prompt is None else prompt
    found: list[tuple[float, float, float]] = []
    try:
        for start in tqdm(range(0, len(questions), batch_size), desc="answering", disable=not progress):
            batch = questions[start : start + batch_size]
            read = [own for own in slots[start : start + batch_size] if own is not None]
            memory.use(read or None)
            rows = [tokenize(tokenizer, asking.replace("{question}", question)) for question, _ in batch]
            inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
            with generating(memory.model):
                ids = memory.model.generate(  # type: ignore[operator]  # PreTrainedModel is no GenerationMixin
                    **inputs.to(memory.model.device), max_new_tokens=max_new_tokens, do_sample=False
                )
            said = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for text, (_, answer) in zip(said, batch, strict=True):
                found.append(answer_scores((text.strip().splitlines() or [""])[0], answer))
    finally:
        memory.use(before)
    means = (sum(column) / len(found) for column in zip(*found, strict=True))
    return dict(zip(("f1", "exact", "contained"), means, strict=True))


def question_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a prompt with `{question}`, about the text before it; in the chat template if the tokenizer has one."""
    if not tokenizer.chat_template:
        return f"\n{QUESTION}\nAnswer:"
    message = [{"role": "user", "content": QUESTION}]
    text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    doubled = tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2  # the tokenizer puts one there itself
    return text.removeprefix(tokenizer.bos_token) if doubled else text


def answer_scores(said: str, answer: str) -> tuple[float, float, float]:
    """Return F1 over words, exact match, and whether the words of `answer` stand in `said` in a row.

    All are without case, punctuation and articles, as in SQuAD.
    """
    words, wanted = (_words(text) for text in (said, answer))
    if not words or not wanted:
        return (float(words == wanted),) * 3
    same = sum((Counter(words) & Counter(wanted)).values())
    contained = any(words[i : i + len(wanted)] == wanted for i in range(len(words)))
    return 2 * same / (len(words) + len(wanted)), float(words == wanted), float(contained)


def _words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
