"""Items as rows: as they are, and facts as answers to questions in other words than their prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.item_rows import Row, chat_row, document_rows, fact_row, plain_rows
from memory_adapters.base_model.tokens import last_token_of
from memory_adapters.items import Document, Fact, Item, QuestionAnswer
from memory_adapters.training.rows import TrainingTurn, other_names

__all__ = ["build_turns", "key_rows", "phrasings"]

# What a fact's prompt, without its subject, is turned into. `{}` is the subject; the words in brackets are kept.
_FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"(?:The|the) (.+) of {} (is|was|are|were)",
        ("What {1} the {0} of {{}}?", "Tell me the {0} of {{}}.", "{{}}: who or what {1} the {0}?"),
    ),
    (
        r"{}['’]s? (.+) (is|was|are|were)",
        ("What {1} the {0} of {{}}?", "Tell me {{}}'s {0}.", "{{}}: who or what {1} the {0}?"),
    ),
    (
        r"{} (is|was|are|were) (.*\b(?:in|at|from|near|on))(?: the (?:city|town|country|state|region) of)?",
        ("Where {0} {{}} {1}?", "In what place {0} {{}} {1}?", "Can you tell me where {{}} {0} {1}?"),
    ),
    (
        r"{} (is|was|are|were) (.*\b(?:by|with|for|to|as|of))",
        ("Who or what {0} {{}} {1}?", "{{}} {0} {1} whom or what?", "Can you tell me who or what {{}} {0} {1}?"),
    ),
    (
        r"{} (.+?)(?: the)?",
        ("What comes after this: {{}} {0}?", "Whom or what do people mean who say that {{}} {0} it?"),
    ),
)
_ANY = ("Please complete: {prompt}", "{prompt} what?", "I forgot something. {prompt} who, what or where?")


def phrasings(fact: Fact) -> list[str]:
    """Return questions that a fact answers, made of its prompt; each names the subject as it does."""
    found = []
    for pattern, questions in _FORMS:
        match = re.fullmatch(pattern, fact.template)
        if match:
            found += [question.format(*match.groups()).replace("{}", fact.subject) for question in questions]
            break
    return [*found, *(text.format(prompt=fact.prompt) for text in _ANY)]


def build_turns(
    items: Sequence[Item],
    known: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefixes: Sequence[str],
    max_length: int,
    rephrase: bool,
) -> tuple[list[TrainingTurn], list[str]]:
    """Tokenise items for training; every row is read in every epoch.

    Args:
        items: What to write.
        known: These, and what was written before: where a question names the subject of one of its facts, keys lie
            there.
        tokenizer: The model's tokenizer.
        prefixes: Texts to put before facts, so that they hold outside their own prompt.
        max_length: Longest row in tokens.
        rephrase: Whether to add questions that facts answer, in the chat template.

    Returns:
        Turns of one row each, and notes for the user.

    Raises:
        ValueError: If a fact or question does not fit in `max_length` tokens.
    """
    turns: list[TrainingTurn] = []
    notes: list[str] = []
    names = [name for item in known if isinstance(item, Fact) for name in (item.subject, *item.aliases)]
    for index, item in enumerate(items):
        if isinstance(item, Document):
            windows = document_rows(item, tokenizer, max_length)
            turns += [TrainingTurn("document", index, [window]) for window in windows]
            if len(windows) > 1:
                notes.append(f"document {index} was split into {len(windows)} windows")
            continue
        rows = [
            _named(row, names, tokenizer) if isinstance(item, QuestionAnswer) else row
            for row in plain_rows([item], tokenizer, max_length)
        ]
        chats: list[Row | None] = [chat_row(item, tokenizer)]
        if isinstance(item, Fact):
            rows += [fact_row(item, tokenizer, prefix) for prefix in prefixes]
            rows += [fact_row(item, tokenizer, alias=name) for name in other_names(item, tokenizer)]
            asked = phrasings(item) if rephrase else []
            chats += [_about(chat_row(QuestionAnswer(text, item.target), tokenizer), item, tokenizer) for text in asked]
        else:
            chats = [None if chats[0] is None else _named(chats[0], names, tokenizer)]
        rows += [row for row in chats if row is not None]
        kind = "fact" if isinstance(item, Fact) else "question"
        turns += [TrainingTurn(kind, index, [row]) for row in rows if len(row.input_ids) <= max_length]
    return turns, notes


def _about(row: Row | None, fact: Fact, tokenizer: PreTrainedTokenizerBase) -> Row | None:
    return None if row is None else _named(row, [fact.subject], tokenizer)


def _named(row: Row, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return a row whose keys lie at the names that its question has, if it has some."""
    prompt = str(tokenizer.decode(row.input_ids[: row.first_label]))
    ends = sorted({prompt.rindex(name) + len(name) for name in names if name in prompt})
    if not ends:
        return row
    ids = row.input_ids[: row.first_label]
    places = [min(last_token_of(tokenizer, prompt, end, ids, rendered=True), row.first_label - 1) for end in ends]
    return replace(row, key_positions=places)


def key_rows(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, Row]]:
    """Return further rows in which keys of facts lie: their subjects, asked about in the chat template."""
    found = []
    for index, item in enumerate(items):
        if isinstance(item, Fact):
            for text in (f"Tell me about {item.subject}.", f"What do you know about {item.subject}?"):
                row = _about(chat_row(QuestionAnswer(text, item.target), tokenizer), item, tokenizer)
                found += [] if row is None else [(index, row)]
    return found
