"""Make the experiment's prompt, with solved claims of the same page before the one to judge; and what is written."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from examples.fever.data import LABELS, Claim, FeverData, Page
from memory_adapters.items import Document, Fact, QuestionAnswer

__all__ = ["ANSWERS", "choose_shots", "claim_as_fact", "documents", "facts", "few_shot_prompt", "solved_claims"]

ANSWERS = dict(zip(LABELS, ("(a)", "(b)", "(c)"), strict=True))
INSTRUCTION = (
    "Determine the factuality of the following claims\n"
    "Answer candidates: (a) supports, (b) refutes, (c) not enough info\n"
)


def few_shot_prompt(claim: Claim, shots: Sequence[Claim], context: str = "") -> str:
    """Return the instruction, the solved claims, the claim to judge, and `A:`.

    Args:
        claim: The claim to judge.
        shots: Solved claims.
        context: Text to put before everything, such as the page.
    """
    before = f"{context}\n\n" if context else ""
    solved = "".join(f"\nClaim: {shot.text}\nA: {ANSWERS[shot.label]}\n" for shot in shots)
    return f"{before}{INSTRUCTION}{solved}\nClaim: {claim.text}\nA:"


def choose_shots(data: FeverData, page: Page, claim: Claim, number: int, seed: int) -> list[Claim]:
    """Solved claims to show before `claim`: labels in turns from a random one on, each from the page's training claims,
    or from other training claims where the page has too few of a label.

    The same claim, number and seed give the same shots; more shots begin with those of fewer. `claim` itself is none.
    """
    rng = random.Random(f"{seed} {page.title} {claim.text}")
    labels = list(LABELS)
    rng.shuffle(labels)
    own = [shot for shot in page.training if shot != claim]
    rng.shuffle(own)
    elsewhere = [shot for other in data.pages if other != page for shot in other.training]
    shots: list[Claim] = []
    for i in range(number):
        label = labels[i % len(labels)]
        left = [shot for shot in own if shot.label == label and shot not in shots]
        if not left:
            others = [s for s in (*elsewhere, *data.fill) if s.label == label and s not in shots and s != claim]
            left = [rng.choice(others)] if others else []
        shots += left[:1]
    return shots


def documents(data: FeverData) -> list[Document]:
    """Doc: the pages' texts."""
    return [Document(page.text) for page in data.pages]


def solved_claims(data: FeverData, num_shots: int, seed: int) -> list[QuestionAnswer]:
    """Temp: the training claims in the few-shot form, each with its answer."""
    return [
        QuestionAnswer(few_shot_prompt(claim, choose_shots(data, page, claim, num_shots, seed)), ANSWERS[claim.label])
        for page in data.pages
        for claim in page.training
    ]


def facts(data: FeverData) -> list[Fact]:
    """Return the supported training claims that are facts about their page; of claims with one prompt, the first."""
    found = [claim_as_fact(page, claim) for page in data.pages for claim in page.training if claim.label == LABELS[0]]
    return list({fact.prompt: fact for fact in reversed(found) if fact is not None}.values())[::-1]


def claim_as_fact(page: Page, claim: Claim) -> Fact | None:
    """Return a claim as subject, relation and target: None unless it names its page and ends in a name or number.

    "Soul Food was released by Fox 2000 Pictures." → "Soul Food was released by" | "Fox 2000 Pictures".
    """
    subject = re.sub(r"\s*\(.*?\)$", "", page.title)
    at = claim.text.find(subject)
    rest = claim.text[at + len(subject) :]
    ending = re.search(r"\s((?:[A-Z0-9][\w'’.-]*)(?:\s(?:of|the|and|[A-Z0-9][\w'’.-]*))*)\.?$", rest)
    if at < 0 or ending is None or not rest[: ending.start()].strip():
        return None
    prompt = claim.text[: at + len(subject)] + rest[: ending.start()]
    return Fact(prompt, subject, ending.group(1).rstrip("."))
