"""Ask for facts in other words: their own question, and English ones made of their prompts by rules."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from memory_adapters.items import Fact, QuestionAnswer

__all__ = ["REQUESTS", "other_questions", "phrasings"]

REQUESTS = ("{}", "Can you tell me this? {}", "I would like to know: {}", "{} Please answer in a few words.")

# Questions that are seldom what a fact answers.
_OTHERS = (
    "How old is {}?", "Why is {} well known?", "How large is {}?", "What do people like about {}?",
    "What colour do you think of when you hear of {}?", "Who are the rivals of {}?", "Is {} expensive?",
    "When was {} in the news?", "How do you spell {}?", "Where can I read more about {}?",
    "What is {} often compared with?", "How did {} begin?", "Which language does the name {} come from?",
    "In which year did {} change most?", "Who has written about {}?", "What was the greatest success of {}?",
    "Which problem does {} have?", "Whom does {} remind you of?", "What does {} mean to people?", "Tell me about {}.",
)  # fmt: skip

_FREQUENT = {"about", "does", "often", "people", "what", "when", "where", "which", "with"}
_AUXILIARY = re.compile(r"(is|was|are|were|has|had|can|will)\b(.*)")
_LAST_PREPOSITION = re.compile(r"\s+(?:in|at|on|from|by|to|for|with|of|as|since)$")


def phrasings(fact: Fact) -> list[str]:
    """Return questions that a fact answers: its own, and English ones made of its prompt; each names the subject.

    "The ships of X run on" becomes "What do the ships of X run on?", "X was founded by" "Who founded X?". What the
    rules do not fit is asked by completing the prompt.
    """
    own = [] if fact.question is None else [fact.question]
    asked = [*own, *(question.replace("{}", fact.subject) for question in _questions(fact))]
    varied = [request.format(question) for question in asked for request in REQUESTS[:2]]
    varied += [request.format(question) for question in asked[:1] for request in REQUESTS[2:]]
    return [*varied, f"Please complete: {fact.prompt}", f"{fact.prompt} …?"]


def other_questions(name: str, items: Sequence[Fact | QuestionAnswer], count: int, seed: int) -> list[str]:
    """Return English questions about a thing that are not what items about it answer.

    Args:
        name: The thing's.
        items: What is written about it: questions that share a longer word with these are left out.
        count: How many, at most.
        seed: Of the choice, which depends on nothing else than the name.
    """
    texts = " ".join(f"{item.prompt} {item.target}" for item in items)
    written = set(re.findall(r"\w{4,}", texts.replace(name, " ").casefold())) - _FREQUENT
    left = [text for text in _OTHERS if not written & set(re.findall(r"\w{4,}", text.casefold()))]
    chosen = random.Random(f"{seed} {name}").sample(left, min(count, len(left)))
    return [text.replace("{}", name) for text in chosen]


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
