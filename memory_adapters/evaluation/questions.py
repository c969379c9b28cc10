"""Ask about facts in other words: question templates for CounterFact's relations, and things with several facts each.

A fact's relation is found by its id or, in data without ids, by the wording of its prompt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from memory_adapters.base_model.unrelated_questions import unrelated_questions
from memory_adapters.evaluation.records import EditRecord, Question, Row, read_rows
from memory_adapters.evaluation.scores.own_words import OwnWordsQuestions
from memory_adapters.items import Fact
from memory_adapters.memory import evenly

__all__ = ["BUILTIN", "Thing", "ThingFact", "load_things", "record_questions", "relation_questions", "thing_questions"]

BUILTIN = "builtin"
MOST_ASKED = 300  # questions of each kind: an answer takes many passes
# About a thing, and about none of its facts.
_BESIDE = ("How many people know {}?", "What could {} learn from others?", "Which sport fits {} best?")
_THINGS = Path(__file__).with_name("things.json")

# Relation: the wordings of its prompts, as regular expressions with {} for the subject, and questions.
_RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, str, str]]] = {
    "P17": (
        (r"{} is located in the country of",),
        ("In which country is {}?", "Which country does {} belong to?", "To what country must I travel to see {}?"),
    ),
    "P19": (
        (r"{} was born in", r"{} (originates|originated) from", r"{} (is|was) (native to|originally from)"),
        ("Where was {} born?", "What is the birthplace of {}?", "In what place did {} come into the world?"),
    ),
    "P20": (
        (r"{} (died|expired|succumbed|passed away|lost their life) (in|at|in the city of)", r"{}'s life ended in"),
        ("Where did {} die?", "What was {}'s place of death?", "In which city was {} in the last hours of life?"),
    ),
    "P27": (
        (r"{}(, who)? (has|holds) a citizenship from", r"{}(,| is|, who is) a citizen of"),
        (
            "Which country is {} a citizen of?",
            "What country issued the passport of {}?",
            "In which country may {} vote?",
        ),
    ),
    "P30": (
        (r"{} is a part of the continent of", r"{} belongs to the continent of", r"{} is located in the continent"),
        ("On which continent is {}?", "Which continent is {} part of?", "To what continent does a trip to {} lead?"),
    ),
    "P36": (
        (r"The capital( city)? of {} is", r"{}'s capital( city)?(,| is)", r"{}, which has the capital( city)?"),
        ("Which city is the capital of {}?", "From which city is {} governed?", "Name the capital of {}."),
    ),
    "P37": (
        (
            r"In {}, (an official language is|they understand|the language spoken is)",
            r"The law in {} declares the language",
            r"The official language of {} is",
        ),
        (
            "Which language do officials speak in {}?",
            "Which language should I learn before I move to {}?",
            "In what language are the laws of {} written?",
        ),
    ),
    "P39": (
        (
            r"{}(, who)? (has|holds) the (position|title) of",
            r"{}'s position is",
            r"{}, whose position is that of",
            r"{} is a",
        ),
        ("What office does {} hold?", "Which post has {}?", "What is {}'s title?"),
    ),
    "P101": (
        (
            r"{} works in the (field|area) of",
            r"{}'s (area|domain) of (work|activity) is",
            r"The domain of (work|activity) of {} is",
            r"The expertise of {} is",
            r"{}'s expertise is",
            r"{} specializes in",
        ),
        ("What field does {} work in?", "What is {} an expert in?", "Which subject does {} know best?"),
    ),
    "P103": (
        (
            r"The (mother tongue|native language) of {} is",
            r"{} is a native speaker of",
            r"{}, (a native|speaker of)",
            r"{} (speaks|spoke) the language",
        ),
        (
            "What is {}'s first language?",
            "Which language did {} grow up with?",
            "What language does {} speak at home?",
        ),
    ),
    "P106": (
        (
            r"The (profession|occupation) of {} is",
            r"{}'s (profession|occupation) is( an?)?",
            r"{}(, who)? works as",
        ),
        ("What does {} do for a living?", "What is {}'s job?", "How does {} earn money?"),
    ),
    "P108": (
        (r"{}(, who)? works for", r"{}( is|, who is) employed by", r"{}, of"),
        ("Who does {} work for?", "Who is {}'s employer?", "Which organisation pays {}'s salary?"),
    ),
    "P127": (
        (r"{}'s owner", r"{} owner", r"{} is owned by", r"{}, (from|by)"),
        ("Who owns {}?", "To whom does {} belong?", "In whose possession is {}?"),
    ),
    "P136": (
        (
            r"{} (performs|is known for performing)",
            r"The genre played by {} is",
            r"{}, who plays",
            r"What does {} play\? They play",
        ),
        ("Which genre does {} belong to?", "What style is {} known for?", "What is the genre of {}?"),
    ),
    "P138": (
        (
            r"{}( is| was|, which is|, which was|,) (named|called) (after|for)",
        ),
        (
            "Who or what is {} named after?",
            "Where does the name of {} come from?",
            "Whose name does {} have?",
        ),
    ),
    "P140": (
        (
            r"{} (follows the religion of|is affiliated with the religion|is follower of)",
            r"The official religion of {} is",
        ),
        ("What is {}'s religion?", "Which faith does {} have?", "What does {} believe in?"),
    ),
    "P159": (
        (
            r"{}( is headquartered|, whose headquarters are|'s headquarters are| is based) in",
            r"The headquarters? of {} is( located)? in",
        ),
        (
            "Where is the head office of {}?",
            "In which city does {} have its main office?",
            "From which city is {} run?",
        ),
    ),
    "P176": (
        (
            r"{}( is|,) (produced|created) by",
            r"{}( is|,) a product (of|manufactured by)",
        ),
        ("Which company makes {}?", "Who is the manufacturer of {}?", "From whose factory does {} come?"),
    ),
    "P178": (
        (
            r"{}( is|,| was) developed by",
            r"{}, a product (developed|created) by",
            r"{} was (created by|a product of)",
        ),
        ("Who developed {}?", "Which company is behind {}?", "Whose work is {}?"),
    ),
    "P190": (
        (r"The twin city of {} is", r"What is the twin city of {}\? It is", r"{} is a twin city of"),
        ("Which city is {} twinned with?", "What is {}'s sister city?", "Name a partner city of {}."),
    ),
    "P264": (
        (
            r"{}( is|, which is) represented by( music label)?",
            r"{}'s( music)? label is",
            r"{} label :",
            r"The music label that is representing {} is",
            r"{}(, released by| recorded for)",
        ),
        ("Which record label is {} with?", "Who releases the music of {}?", "On what label can I find {}?"),
    ),
    "P364": (
        (r"The original language of {} (is|was)",),
        (
            "In which language was {} first made?",
            "What language was {} in, before any translation?",
            "Which language do I hear in {}?",
        ),
    ),
    "P407": (
        (r"The language of {} (is|was)", r"{} (is|was) written in"),
        (
            "In which language is {}?",
            "Which language must I know to understand {}?",
            "What language did the author of {} use?",
        ),
    ),
    "P413": (
        (
            r"{} plays (as|in the position of)",
            r"{}, who plays the position",
            r"Which position does {} play\? They play as",
        ),
        (
            "Which position does {} have on the field?",
            "Where in the team does {} play?",
            "What is {}'s role in the team?",
        ),
    ),
    "P449": (
        (
            r"{} (debuted|premieres|premiered|is to debut|was released|was originally aired) on",
        ),
        (
            "Which network first showed {}?",
            "On which channel did {} start?",
            "Where on television did people first see {}?",
        ),
    ),
    "P463": (
        (
            r"{} is affiliated with( the)?",
            r"{} belongs to the organization of",
            r"{} is a (member of|part of the)",
        ),
        (
            "Which organisation does {} belong to?",
            "What organisation is {} in?",
            "Which body has {} among its members?",
        ),
    ),
    "P495": (
        (
            r"{} was created in the country of",
            r"{}(,|, that was| was) (formulated|developed) in",
            r"{}, created in",
            r"{}, that originated in",
            r"{}( was|, that was|) from",
        ),
        ("Which country does {} come from?", "In what country did {} begin?", "What is the home country of {}?"),
    ),
    "P641": (
        (r"{} professionally plays the sport", r"{} is a professional", r"What sport does {} play\? They play"),
        ("Which sport does {} do?", "What is {}'s sport?", "In which sport does {} compete?"),
    ),
    "P740": (
        (
            r"{}(, that was created| was created| originated| started| formed) in",
            r"{}(,|, that was| that was| was) (founded|started|formed) in",
        ),
        ("Where did {} start?", "In which place did {} begin?", "What is the place of origin of {}?"),
    ),
    "P937": (
        (
            r"{} (worked|was employed|used to work) in",
            r"{} worked in the city of",
            r"{} (found employment|took up work) in",
        ),
        (
            "In which city did {} work?",
            "Where was {}'s place of work?",
            "In what city did {} have a job?",
        ),
    ),
    "P1303": (
        (
            r"{} plays the( instrument)?",
            r"{}(, performing| performs) on the",
            r"{}, playing the",
        ),
        (
            "Which instrument does {} play?",
            "What does {} play on stage?",
            "On what instrument would I hear {}?",
        ),
    ),
    "P1412": (
        (r"The language used by {} is", r"{} (speaks|writes in)"),
        ("Which language does {} use?", "In what language can I talk with {}?", "What language do I hear from {}?"),
    ),
    "P276": (
        (
            r"{}(,| is| can be found| is located|, located|, which is located) in",
            r"The location of {} is",
            r"Where is {}\? It is located in",
            r"{} is within",
        ),
        ("Where is {}?", "Where would I find {}?", "In what place is {}?"),
    ),
    "sport, position or instrument": (
        (r"{}, the", r"{} plays"),
        ("What does {} play?", "What is {} known for playing?", "When {} plays, what is it?"),
    ),
    "origin": (
        (r"{} is from",),
        ("Where does {} come from?", "What is the origin of {}?", "From where is {}?"),
    ),
}  # fmt: skip
_RELATIONS["P131"] = ((), _RELATIONS["P276"][1])
_PROMPTS = [
    (re.compile(pattern.replace("{}", "(?P<subject>.+?)")), relation)
    for relation, (patterns, _) in _RELATIONS.items()
    for pattern in patterns
]


def relation_questions(relation: str, subject: str) -> tuple[str, ...]:
    """Return three questions about a subject.

    Args:
        relation: An id of Wikidata, such as `"P103"`, or a fact's prompt with `{}` for the subject.
        subject: Whom or what they are about.

    Returns:
        Nothing if the relation is none of CounterFact's.
    """
    known = relation if relation in _RELATIONS else (_found(relation) or ("", ""))[0]
    return tuple(question.replace("{}", subject) for question in _RELATIONS[known][1]) if known else ()


def _found(prompt: str) -> tuple[str, str] | None:
    """Return the relation and the subject of a prompt; of several that fit, that with the shortest subject."""
    fits = [(match["subject"], relation) for one, relation in _PROMPTS if (match := one.fullmatch(prompt.strip()))]
    return min(((relation, subject) for subject, relation in fits), key=lambda fit: len(fit[1]), default=None)


def record_questions(records: Sequence[EditRecord]) -> OwnWordsQuestions:
    """Return questions in other words about records, and about their neighbours and well-known things.

    CounterFact's records have three questions each, by their relation. Of others those paraphrases and neighbours are
    asked that are questions already, as zsRE's are. A record without either has none.
    """
    asked, others = list[Question](), list[str]()
    subjects = {record.fact.subject.casefold() for record in records}
    for number, record in enumerate(records):
        fact, target = record.fact, record.fact.target
        own = relation_questions(record.relation, fact.subject) or relation_questions(fact.template, fact.subject)
        own = own or tuple(paraphrase for paraphrase in record.paraphrases if _is_question(paraphrase))
        asked += [Question(question, target) for question in own]
        for prompt, *_ in record.neighbours:
            relation, subject = _found(prompt) or ("", "")
            if relation and subject.casefold() not in subjects:
                others.append(relation_questions(relation, subject)[number % 3])
            elif _is_question(prompt):
                others.append(prompt)
    facts = [record.fact for record in records]
    objects = dict.fromkeys(fact.target for fact in facts)
    every = [*evenly(list(dict.fromkeys(others)), MOST_ASKED), *unrelated_questions(facts)]
    beside = tuple(evenly(_other_relations(records), MOST_ASKED))
    return OwnWordsQuestions(tuple(evenly(asked, MOST_ASKED)), tuple(every) if asked else (), tuple(objects), beside)


def _other_relations(records: Sequence[EditRecord]) -> list[Question]:
    """Return a question about each record's subject that is about another record's relation."""
    known = [(record, _relation(record)) for record in records]
    found = []
    for i, (record, own) in enumerate(known):
        fact = record.fact
        others = (
            relation
            for other, relation in (*known[i + 1 :], *known[:i])
            if relation and own and relation != own and other.fact.target != fact.target
        )
        if relation := next(others, None):
            found.append(Question(relation_questions(relation, fact.subject)[i % 3], fact.target))
    return found


def _relation(record: EditRecord) -> str | None:
    """Return the id of a record's relation, if it has questions."""
    if record.relation in _RELATIONS:
        return record.relation
    return (_found(record.fact.prompt) or (None,))[0]


def _is_question(text: str) -> bool:
    return text.rstrip().endswith("?")


@dataclass(frozen=True)
class ThingFact:
    """Store a fact about a thing, and questions about it in other words.

    Attributes:
        fact: The fact.
        questions: Questions that no method may be trained on.
        training_questions: Questions that a method may be trained on.
    """

    fact: Fact
    questions: tuple[Question, ...]
    training_questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Thing:
    """Store a company, a person, a place or whatever else, with its facts.

    Attributes:
        subject: Its name.
        facts: What is written about it.
        consequences: Questions whose answers follow from the facts, perhaps with what the model knew before.
    """

    subject: str
    facts: tuple[ThingFact, ...]
    consequences: tuple[Question, ...] = ()


def load_things(source: str | os.PathLike[str] = BUILTIN) -> list[Thing]:
    """Read things with several facts each: those of the package (28 invented ones), or your own.

        [{"subject": "Lumen Ferry", "facts": [
            {"prompt": "The home port of Lumen Ferry is", "target": "Lisbon",
             "questions": ["Which port do the ships of Lumen Ferry sail from?"]}]}]

    A fact may also have `alternatives` (other answers that count) and `training_questions`, which are never asked to
    score. A thing may have `consequences`: objects with `question`, `answer` and, optionally, `alternatives` and a
    `kind`, such as the package's "composed" (what the model knows about the object: the country of a city) and
    "reversed" (the thing is asked for, and not named). `{}` in a prompt or a question stands for the subject.

    Args:
        source: `"builtin"`, or the path of a .json or .jsonl file or a data set on the Hub.

    Raises:
        FileNotFoundError, ImportError: As `load_counterfact`.
        ValueError: If there is no thing, or a row does not fit; it is named.
    """
    things = [_thing(row) for row in read_rows(_THINGS if source == BUILTIN else source)]
    if not things:
        raise ValueError(f"`{os.fspath(source)}` holds no thing: give at least one.")
    return things


def _thing(row: Row) -> Thing:
    subject, facts = row.text("subject"), row.value("facts")
    if not isinstance(facts, list) or not facts:
        raise row.error("facts", f"must be a list of facts, got {facts!r}")
    consequences = row.value("consequences") or []
    if not isinstance(consequences, list):
        raise row.error("consequences", f"must be a list of questions, got {consequences!r}")
    return Thing(
        subject,
        tuple(_thing_fact(row, subject, fact) for fact in facts),
        tuple(_consequence(row, subject, one) for one in consequences),
    )


def _consequence(row: Row, subject: str, fields: object) -> Question:
    if not isinstance(fields, dict):
        raise row.error("consequences", f"must hold objects with question and answer, got {fields!r}")
    own = replace(row, fields=fields)
    alternatives = own.texts("alternatives") if own.has("alternatives") else ()
    question = own.text("question").replace("{}", subject)
    return Question(question, own.text("answer"), alternatives, own.optional_text("kind") or "")


def _thing_fact(row: Row, subject: str, fields: object) -> ThingFact:
    if not isinstance(fields, dict):
        raise row.error("facts", f"must hold objects with prompt, target and questions, got {fields!r}")
    own = replace(row, fields={**fields, "subject": subject})
    fact = own.fact("prompt", "subject", "target")
    alternatives = own.texts("alternatives") if own.has("alternatives") else ()
    asked = {
        name: tuple(
            Question(text.replace("{}", subject), fact.target, alternatives)
            for text in (own.texts(name) if name == "questions" or own.has(name) else ())
        )
        for name in ("questions", "training_questions")
    }
    return ThingFact(fact, **asked)


def thing_questions(things: Sequence[Thing], others: Sequence[Thing] = ()) -> OwnWordsQuestions:
    """Return the questions about things that are written, and about others and well-known things.

    Args:
        things: What is written.
        others: Things that are not; one that has the name of a written one is left out.
    """
    facts = [fact for thing in things for fact in thing.facts]
    written = {thing.subject.casefold() for thing in things}
    every = [
        fact.questions[0].prompt
        for thing in others
        if thing.subject.casefold() not in written
        for fact in thing.facts
        if fact.questions
    ]
    asked = [question for fact in facts for question in fact.questions]
    objects = dict.fromkeys(one for fact in facts for q in fact.questions for one in (q.answer, *q.alternatives))
    return OwnWordsQuestions(
        tuple(evenly(asked, MOST_ASKED)),
        (*evenly(every, MOST_ASKED), *unrelated_questions([fact.fact for fact in facts])),
        tuple(objects),
        tuple(
            Question(text.replace("{}", thing.subject), *_first_and_rest(thing)) for thing in things for text in _BESIDE
        ),
    )


def _first_and_rest(thing: Thing) -> tuple[str, tuple[str, ...]]:
    """Return what is written about a thing, as the answer and the alternatives of a question."""
    named = (one for fact in thing.facts for q in fact.questions for one in (q.answer, *q.alternatives))
    first, *rest = dict.fromkeys((*(fact.fact.target for fact in thing.facts), *named))
    return first, tuple(rest)


@dataclass(frozen=True)
class DocumentQuestions:
    """Store a text, and questions that it answers."""

    text: str
    questions: tuple[Question, ...]


def load_documents(source: str | os.PathLike[str], limit: int | None = None) -> list[DocumentQuestions]:
    """Read texts with questions that they answer.

        [{"text": "The Brandt K2 is …", "questions": ["What is it?"], "answers": ["a coffee grinder"]}]

    `context` may stand for `text`, as in data sets for reading, and an answer may be a list, of which any counts.

    Args:
        source: The path of a .json or .jsonl file, or a data set on the Hub.
        limit: Read the first so many; None for all.

    Raises:
        FileNotFoundError, ImportError: As `load_counterfact`.
        ValueError: If there is no text, or a row does not fit; it is named.
    """
    documents = [_document(row) for row in read_rows(source, limit)]
    if not documents:
        raise ValueError(f"`{os.fspath(source)}` holds no text: give at least one.")
    return documents


def _document(row: Row) -> DocumentQuestions:
    text = row.text("text" if row.has("text") or not row.has("context") else "context")
    asked, answers = row.texts("questions"), row.value("answers")
    if not isinstance(answers, list) or len(answers) != len(asked):
        raise row.error(
            "answers", f"must be a list with an answer to each of the {len(asked)} questions, got {answers!r}"
        )
    known = [[one] if isinstance(one, str) else one for one in answers]
    for own in known:
        if not isinstance(own, list) or not own or not all(isinstance(one, str) and one.strip() for one in own):
            raise row.error("answers", f"must hold texts, or lists of texts, got {own!r}")
    return DocumentQuestions(
        text, tuple(Question(q, own[0], tuple(own[1:])) for q, own in zip(asked, known, strict=True))
    )
