"""Items as rows: as they are, and facts as answers to questions in other words than their prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.item_rows import Row, chat_row, document_rows, fact_row, keys_at_names, plain_rows
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.items import Document, Fact, Item, QuestionAnswer
from memory_adapters.training.rows import TrainingTurn, known_names, other_names

__all__ = ["build_turns", "key_rows", "phrasings", "spellings"]

_AUXILIARY = re.compile(r"(is|was|are|were|has|had|can|will)\b(.*)")
_LAST_PREPOSITION = re.compile(r"\s+(?:in|at|on|from|by|to|for|with|of|as|since)$")
_REQUESTS = ("{}", "Can you tell me this? {}", "I would like to know: {}", "{} Please answer in a few words.")


def phrasings(fact: Fact) -> list[str]:
    """Return English questions that a fact answers, made of its prompt; each names the subject as it does.

    "The ships of X run on" becomes "What do the ships of X run on?", "X was founded by" "Who founded X?". What the
    rules do not fit is asked by completing the prompt.
    """
    asked = [question.replace("{}", fact.subject) for question in _questions(fact)]
    varied = [request.format(question) for question in asked for request in _REQUESTS[:2]]
    varied += [request.format(question) for question in asked[:1] for request in _REQUESTS[2:]]
    return [*varied, f"Please complete: {fact.prompt}", f"{fact.prompt} …?"]


def _questions(fact: Fact) -> list[str]:
    """Return questions with `{}` for the subject."""
    before, _, after = fact.template.partition("{}")
    before, after = before.strip(), re.sub(r"(?:\s+(?:the|a|an))+$", "", after).strip()
    possessive = re.match(r"['’]s?\s+(.+?)\s+(is|was|are|were)\b(.*)", after)
    # The sentence is: `lead`, what it is about (`noun`), and what is said of it (`said`).
    lead, noun, said = "", "{}", after
    if possessive:
        noun, said = f"{{}}'s {possessive[1]}", possessive[2] + possessive[3]
    elif re.search(r"\b(?:of|for|in|at)(?: the)?$", before) or before.casefold() in ("the", "a", "an"):
        noun = f"{before[:1].lower()}{before[1:]} {{}}"
    else:
        lead = f" {before[:1].lower()}{before[1:]}".rstrip(", ") if before else ""
    if not said or not said[0].isalnum() or "?" in fact.template:
        return []
    words = _question_words(fact.target)
    found = []
    auxiliary = _AUXILIARY.fullmatch(said)
    if auxiliary and (passive := re.fullmatch(r"\s+(\w+) by", auxiliary[2])):
        found += [f"Who {passive[1]} {noun}{lead}?", f"By whom {auxiliary[1]} {noun} {passive[1]}{lead}?"]
    for word in words:
        if auxiliary:
            verb, rest = auxiliary[1], auxiliary[2].rstrip()
        else:
            own, _, rest = said.partition(" ")
            plural = not own.endswith("s")
            past = own.endswith("ed")
            verb = "did" if past else "do" if plural else "does"
            rest = f" {_base_form(own)} {rest}".rstrip()
        if word in ("Where", "When"):
            rest = _LAST_PREPOSITION.sub("", rest)
        found.append(f"{word} {verb} {noun}{rest}{lead}?")
    return found


def _question_words(target: str) -> list[str]:
    if re.search(r"\b(?:1\d|20)\d\d\b", target):
        return ["When", "In what year", "What"]
    if target[:1].isupper():
        return ["Who", "Where", "What"] if " " in target else ["Where", "What", "Who"]
    return ["What", "How", "When"]


def _base_form(verb: str) -> str:
    """Return the base form of an English verb in the third person or a regular past tense, by its ending."""
    for ending, instead in (("ied", "y"), ("ies", "y"), ("ed", ""), ("sses", "ss"), ("shes", "sh"), ("ches", "ch")):
        if verb.endswith(ending):
            return verb[: -len(ending)] + instead
    return verb[:-1] if verb.endswith("s") else verb


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
    names = known_names(known)
    for index, item in enumerate(items):
        if isinstance(item, Document):
            windows = document_rows(item, tokenizer, max_length)
            turns += [TrainingTurn("document", index, [window]) for window in windows]
            if len(windows) > 1:
                notes.append(f"document {index} was split into {len(windows)} windows")
            continue
        rows = [
            keys_at_names(row, names, tokenizer) if isinstance(item, QuestionAnswer) else row
            for row in plain_rows([item], tokenizer, max_length)
        ]
        chats: list[Row | None] = [chat_row(item, tokenizer)]
        if isinstance(item, Fact):
            rows += [fact_row(item, tokenizer, prefix) for prefix in prefixes]
            rows += [fact_row(item, tokenizer, alias=name) for name in other_names(item, tokenizer)]
            asked = phrasings(item) if rephrase else []
            chats += [_about(chat_row(QuestionAnswer(text, item.target), tokenizer), item, tokenizer) for text in asked]
        else:
            chats = [None if chats[0] is None else keys_at_names(chats[0], names, tokenizer)]
        rows += [row for row in chats if row is not None]
        kind = "fact" if isinstance(item, Fact) else "question"
        turns += [TrainingTurn(kind, index, [row]) for row in rows if len(row.input_ids) <= max_length]
    return turns, notes


def _about(row: Row | None, fact: Fact, tokenizer: PreTrainedTokenizerBase) -> Row | None:
    return None if row is None else keys_at_names(row, [fact.subject], tokenizer)


def spellings(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of a fact's subject, at the beginning of a text and within one; none for other items."""
    if not isinstance(item, Fact):
        return []
    names = [item.subject, *other_names(item, tokenizer)]
    found = [tokenize(tokenizer, text, rendered=True) for name in names for text in (f" {name}", name)]
    return list(map(list, dict.fromkeys(tuple(ids) for ids in found if ids)))


def key_rows(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, Row]]:
    """Return further rows in which keys of facts lie: their subjects, asked about in the chat template."""
    found = []
    for index, item in enumerate(items):
        if isinstance(item, Fact):
            for text in (f"Tell me about {item.subject}.", f"What do you know about {item.subject}?"):
                row = _about(chat_row(QuestionAnswer(text, item.target), tokenizer), item, tokenizer)
                found += [] if row is None else [(index, row)]
    return found
