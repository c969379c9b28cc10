"""Invent things like those of the package: their kinds of facts and their questions, with other names and answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from memory_adapters.evaluation.questions import Thing, ThingFact
from memory_adapters.evaluation.records import Question

SYLLABLES = ["ka", "lo", "mi", "ren", "sta", "vo", "dur", "el", "quin", "ban", "tor", "esh", "wyn", "hal", "pra", "fen"]
# Words of a name that say what the thing is.
BEFORE = {"Castle", "Lake", "Port"}
BEHIND = {
    *("Airlines", "Batteries", "Breweries", "Bridge", "Ceramics", "Chocolate", "Cycles", "Fisheries", "Insurance"),
    *("Island", "Museum", "Park", "Publishing", "Robotics", "Software", "Textiles", "Valley"),
}
# What an answer may be replaced by: the others of its line.
ANSWERS = [
    line.split(", ")
    for line in (
        "Nairobi, Bologna, Rotterdam, Dublin, Bergen, Jaipur, Malmö, Gdansk, Marrakesh, Galway, Coimbra, Ludlow, "
        "Vienna, Lisbon, Oslo, Turin, Havana, Seoul, Quito, Leipzig, Ghent, Osaka",
        "Iceland, Uruguay, Ecuador, Tasmania, Portugal, Bolivia, Ghana, Nepal, Finland, Jordan",
        "Helga Strand, Priya Nolan, Samuel Okoro, Lena Abadi, Gwen Tallis, Viktor Lund, Marta Reyes, Yusuf Demir, "
        "Clara Voss, Anselm Croy, Elin Haugen, Rosa Quintero, Duke of Parma, Saint Brigid, Ngozi, Hugo Marsh, "
        "Ines Duarte, Peter Lang, Amara Diallo, Nils Berg",
        "orange, yellow, pink, green, purple, silver, black, turquoise",
        "1987, 1954, 1923, 1968, 1899, 1975, 2003, 1941",
        "bamboo, zinc, granite, ivy, copper, oak, marble, steel",
        "heron, goats, frog, turtles, herring, camel, otter, sheep, owl, salmon",
        "strawberries, honey, peanuts, goulash, cherries, cork, plums, maple syrup, olives, risotto",
        "teapots, boats, umbrellas, clocks, typewriters, silk, violins, kites, lanterns, ladders",
        "beekeeper, dentists, gardening, geology, lighthouses, fencing, plumber, pilots, chess, astronomy, rowing",
        "harp, bagpipes, cello, trumpet, banjo, flute",
        "Pip, Aurora, Biscuit, Black Otter, Juno, Marble, Red Fox, Comet",
        "Hitachi, Volvo, Nokia, Siemens, Bosch, Fiat",
        "Severn, Loire, Danube, Tagus, Elbe, Garonne",
        "triangle, star, hexagon, crescent",
        "Haskell, Pascal, Fortran, Erlang",
        "hospital, library, prison, hotel",
        "nine years, six years, twelve years, four years",
        "212 metres, 340 metres, 175 metres, 96 metres",
        "two euros, five euros, one euro, three euros",
        "Thursday, Monday, Sunday, Friday",
        "cedar, willow, chestnut, birch",
    )
]


def many_things(things: Sequence[Thing], count: int, seed: int = 0) -> list[Thing]:
    """Return `count` things: each like one of `things` in turn, with a name of its own and answers of the same kind."""
    rng = random.Random(seed)
    named = {thing.subject for thing in things}
    found: list[Thing] = []
    while len(found) < count:
        thing = things[len(found) % len(things)]
        name = _name(thing.subject, rng)
        if name not in named:
            named.add(name)
            found.append(Thing(name, tuple(_other_fact(fact, thing.subject, name, rng) for fact in thing.facts)))
    return found


def _name(like: str, rng: random.Random) -> str:
    invented = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize() for _ in range(2)]
    first, *_, last = like.split()
    if last in BEHIND:
        return f"{invented[0]} {last}"
    return f"{first} {invented[0]}" if first in BEFORE else " ".join(invented)


def _other_fact(fact: ThingFact, subject: str, name: str, rng: random.Random) -> ThingFact:
    old = fact.fact.target
    answer = rng.choice([one for line in ANSWERS if old in line for one in line if one != old])

    def asked(questions: Sequence[Question]) -> tuple[Question, ...]:
        return tuple(
            q._replace(prompt=q.prompt.replace(subject, name), answer=answer, alternatives=()) for q in questions
        )

    new = replace(fact.fact, prompt=fact.fact.prompt.replace(subject, name), subject=name, target=answer)
    return ThingFact(new, asked(fact.questions), asked(fact.training_questions))
