"""Items as rows: as they are, and facts as answers to questions in other words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.item_rows import Row, chat_row, fact_row, plain_rows
from memory_adapters.items import Fact, QuestionAnswer
from memory_adapters.keys.things import Thing, keys_at_thing, keys_at_words, rendered
from memory_adapters.training.rows import other_names

__all__ = ["phrasings", "thing_rows"]


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


def thing_rows(
    thing: Thing,
    terms: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefixes: Sequence[str],
    max_length: int,
    rephrase: bool,
) -> list[Row]:
    """Tokenise what a thing's LoRA is trained on.

    Args:
        thing: The thing.
        terms: What its keys lie at if it has no name; see `terms_of`.
        tokenizer: The model's tokenizer.
        prefixes: Texts to put before facts, so that they hold outside their own prompt.
        max_length: Longest row in tokens.
        rephrase: Whether to add questions that facts answer, in the chat template.

    Raises:
        ValueError: If a fact or question does not fit in `max_length` tokens.
    """
    rows: list[Row] = []
    for number, item in enumerate(thing.items):
        own = plain_rows([item], tokenizer, max_length)
        if isinstance(item, Fact):
            own += [fact_row(item, tokenizer, prefix) for prefix in prefixes]
            own += [fact_row(item, tokenizer, alias=name) for name in other_names(item, tokenizer)]
            own += rendered([chat_row(item, tokenizer)])
            questions = [QuestionAnswer(text, item.target) for text in phrasings(item)] if rephrase else []
            own += [
                keys_at_thing(row, thing, tokenizer) for row in rendered(chat_row(one, tokenizer) for one in questions)
            ]
            asked = []
        elif isinstance(item, QuestionAnswer):
            varied = _REQUESTS if rephrase else _REQUESTS[:1]
            asked = [QuestionAnswer(text.format(item.question), item.answer) for text in varied]
        else:
            asked = []
        own += rendered(chat_row(one, tokenizer) for one in asked)
        if not isinstance(item, Fact):
            own = [keys_at_words(row, thing.spellings or terms, tokenizer) for row in own]
        rows += [replace(row, item=number) for row in own if len(row.input_ids) <= max_length]
    return rows
