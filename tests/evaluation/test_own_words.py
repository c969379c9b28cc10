"""Questions in other words: what is asked, how answers are judged, and what is compared with the base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from memory_adapters import Document, Fact, QuestionAnswer
from memory_adapters.base_model import answering
from memory_adapters.base_model.answering import chat_answers, greedy_answers
from memory_adapters.base_model.chat import rendered_question
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.base_model.unrelated_questions import share_same, unrelated_answers, unrelated_questions
from memory_adapters.evaluation.edit_report import EditReport, answer_table, evaluate_edits, score_table
from memory_adapters.evaluation.questions import (
    load_documents,
    load_things,
    record_questions,
    relation_questions,
    thing_questions,
)
from memory_adapters.evaluation.records import EditRecord, Question, load_counterfact
from memory_adapters.evaluation.scores.own_words import OwnWordsQuestions, leak, names, score_own_words
from tests.support.models import byte_tokenizer, tiny_model

QUESTIONS = ["Where is Oslo?", "Who was the first to see the Eiffel Tower from above?", "Why?"]
PARIS = EditRecord(
    Fact("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"),
    "French",
    neighbours=(("Michel Rocard is a native speaker of", "French"), ("Lyon is nice, and", "so is Nice")),
)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_model(), byte_tokenizer(chat=True)


def test_answers_are_those_of_each_question_alone(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    answers = chat_answers(model, tokenizer, QUESTIONS, num_tokens=6, batch_tokens=200)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        chat = rendered_question(tokenizer, question)
        assert chat is not None
        assert [answer] == greedy_answers(model, tokenizer, [tokenize(tokenizer, chat[0], rendered=True)], 6)
    assert chat_answers(model, tokenizer, []) == []


def test_without_a_template_the_first_line_of_a_plain_answer_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = byte_tokenizer(), list[str]()

    def said(model: Any, tokenizer: Any, rows: list[list[int]], num_tokens: int) -> list[str]:
        asked.extend(tokenizer.batch_decode(rows))
        return ["\n In Norway.\nQuestion: Where is Rome?"] * len(rows)

    monkeypatch.setattr(answering, "greedy_answers", said)
    assert chat_answers(tiny_model(), tokenizer, QUESTIONS[:1]) == ["In Norway."]
    assert asked == ["Question: Where is Oslo?\nAnswer:"]


@pytest.mark.parametrize(
    ("answer", "objects", "named"),
    [
        ("It is in ROME, of course.", ["Rome"], True),
        ("It is Romeo.", ["Rome"], False),
        ("It costs 2 euros.", ["two euros", "2 euros"], True),
        ("A fish.", ["fishery"], False),
        ("それは東京です", ["東京"], True),
        ("", ["Rome"], False),
    ],
)
def test_an_answer_names_whole_words_in_any_case(answer: str, objects: list[str], named: bool) -> None:
    assert names(answer, objects) is named


def test_leak_counts_what_is_named_anew() -> None:
    before, after = ["Rome.", "Paris.", "Oslo."], ["Rome.", "It is rome.", "Bergen."]
    assert leak(before, after, ["Rome", "Lima"]) == pytest.approx(1 / 3)
    assert share_same(before, after) == pytest.approx(1 / 3)
    assert leak([], [], ["Rome"]) is None
    assert share_same([], []) is None


def test_scores(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    one = chat_answers(model, tokenizer, QUESTIONS[:1])[0]
    asked = (Question(QUESTIONS[0], "no such word", (one,)), Question(QUESTIONS[1], "no such word"))
    questions = OwnWordsQuestions(asked, tuple(QUESTIONS), ("Rome",))
    scores = score_own_words(model, tokenizer, questions)
    assert (scores.own_words, scores.same, scores.leak) == (0.5, None, None), "nothing to compare with"
    assert [answer.named for answer in scores.answers] == [True, False]
    scores = score_own_words(model, tokenizer, questions.with_base_answers(model, tokenizer))
    assert (scores.own_words, scores.same, scores.leak) == (0.5, 1.0, 0.0)
    other = score_own_words(tiny_model(seed=1), tokenizer, questions.with_base_answers(model, tokenizer))
    assert other.same == 0.0
    now = chat_answers(tiny_model(seed=1), tokenizer, QUESTIONS[:2])
    beside = (Question(QUESTIONS[0], "no such word", (now[0],)), Question(QUESTIONS[1], "no such word"))
    questions = dataclasses.replace(questions, beside=beside).with_base_answers(model, tokenizer)
    assert score_own_words(model, tokenizer, questions).spill == 0.0
    assert score_own_words(tiny_model(seed=1), tokenizer, questions).spill == 0.5


def test_questions_about_what_is_written_are_not_unrelated(tiny: tuple[Any, Any]) -> None:
    every = unrelated_questions([])
    assert len(every) == len(set(every)) == 16
    written = [
        Fact("{} is in", "mount everest", "Chad"),
        QuestionAnswer("Who is Mozart?", "A cook."),
        Document("The Nile is short."),
    ]
    left = unrelated_questions(written)
    assert len(left) == 13
    assert not any(name in question for question in left for name in ("Everest", "Mozart", "Nile"))
    answers = unrelated_answers(*tiny, written)
    assert len(answers) == 13
    assert share_same(answers, unrelated_answers(*tiny, written)) == 1
    assert 0 < len(unrelated_answers(*tiny, [], longest=80)) < 16
    assert unrelated_answers(*tiny, [], longest=24) == []


@pytest.mark.parametrize(
    ("relation", "expected"),
    [
        ("P103", "What is Ada's first language?"),
        ("The mother tongue of {} is", "What is Ada's first language?"),
        ("{}, who holds a citizenship from", "Which country is Ada a citizen of?"),
        ("What is the twin city of {}? It is", "Which city is Ada twinned with?"),
        ("{} was formed in", "Where did Ada start?"),
    ],
)
def test_relations_are_found_by_id_and_by_wording(relation: str, expected: str) -> None:
    found = relation_questions(relation, "Ada")
    assert found[0] == expected
    assert len(set(found)) == 3
    assert all("Ada" in question and "{}" not in question for question in found)
    assert relation_questions("{} weighs", "Ada") == ()


def test_the_questions_of_records() -> None:
    questions = record_questions([PARIS])
    assert [question.answer for question in questions.asked] == ["English"] * 3
    assert questions.others == ("What is Michel Rocard's first language?", *unrelated_questions([PARIS.fact]))
    assert questions.objects == ("English",)
    about_itself = EditRecord(PARIS.fact, neighbours=(("The mother tongue of Danielle Darrieux is", "French"),))
    assert record_questions([about_itself]).others == tuple(unrelated_questions([PARIS.fact]))
    zsre = EditRecord(Fact("Where is Oslo?", "Oslo", "Peru"), "Norway", ("Oslo is where?",), (("who is it?", "me"),))
    questions = record_questions([zsre])
    assert [question.prompt for question in questions.asked] == ["Oslo is where?"]
    assert questions.others[0] == "who is it?"
    unknown = record_questions([EditRecord(Fact("{} weighs", "Ada", "60 kg"))])
    assert unknown.asked == unknown.others == ()


def test_questions_beside_what_is_written_are_of_other_relations() -> None:
    born = EditRecord(Fact("{} was born in", "Ada Byron", "Lima"))
    questions = record_questions([PARIS, born])
    assert [(one.prompt, one.answer) for one in questions.beside] == [
        ("Where was Danielle Darrieux born?", "English"),
        (relation_questions("P103", "Ada Byron")[1], "Lima"),
    ]
    (thing,) = load_things()[:1]
    of_thing = thing_questions([thing]).beside
    assert all(thing.subject in one.prompt for one in of_thing)
    assert {fact.fact.target for fact in thing.facts} <= {of_thing[0].answer, *of_thing[0].alternatives}


def test_counterfact_is_covered(data: Path) -> None:
    records = load_counterfact(data / "counterfact" / "edit.json", 2000)
    assert all(relation_questions(record.relation, record.fact.subject) for record in records)
    known = json.loads((data / "counterfact" / "known_1000.json").read_text(encoding="utf-8"))
    assert all(relation_questions(row["relation_id"], "Ada") for row in known)


def test_the_things_of_the_package() -> None:
    things = load_things()
    assert len({thing.subject for thing in things}) == len(things) == 28
    assert all(3 <= len(thing.facts) <= 5 for thing in things)
    for thing in things:
        for fact in thing.facts:
            assert len(fact.questions) == len(fact.training_questions) == 2
            asked = [question.prompt for question in (*fact.questions, *fact.training_questions)]
            assert len(set(asked)) == 4
            assert all(thing.subject in question and not names(question, [fact.fact.target]) for question in asked)
    targets = [fact.fact.target for thing in things for fact in thing.facts]
    assert len(set(targets)) == len(targets), "a leak shows where it comes from"
    for thing in things:
        assert thing.consequences
        for question in thing.consequences:
            told = [question.prompt, *(fact.fact.target for fact in thing.facts)]
            assert not any(names(text, (question.answer, *question.alternatives)) for text in told), "it must follow"
            assert question.kind == ("composed" if thing.subject in question.prompt else "reversed")
            assert (question.answer == thing.subject) == (question.kind == "reversed")
    questions = thing_questions(things[:2], things)
    assert len(questions.asked) == 2 * sum(len(thing.facts) for thing in things[:2])
    assert not any(thing.subject in question for thing in things[:2] for question in questions.others)
    assert any(things[2].subject in question for question in questions.others)
    assert "Nairobi" in questions.objects


def test_things_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "things.json"
    ferry = {"prompt": "{} sails from", "target": "Lisbon", "questions": ["Where is {} at home?"]}
    follows = [{"question": "In which country is {} at home?", "answer": "Portugal"}]
    row = {"subject": "Ferry", "facts": [ferry], "consequences": follows}
    file.write_text(json.dumps([row]), encoding="utf-8")
    (thing,) = load_things(file)
    assert thing.consequences == (Question("In which country is Ferry at home?", "Portugal"),)
    assert thing.facts[0].fact == Fact("Ferry sails from", "Ferry", "Lisbon")
    assert thing.facts[0].questions == (Question("Where is Ferry at home?", "Lisbon"),)
    assert thing.facts[0].training_questions == ()


A = {"subject": "A", "facts": [{"prompt": "A is", "target": "B", "questions": []}]}


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "holds no thing"),
        ([{"facts": []}], "row 1: `subject` is missing"),
        ([{"subject": "A", "facts": []}], r"row 1: `facts` must be a list of facts, got \[\]"),
        ([{"subject": "A", "facts": ["A is B"]}], "`facts` must hold objects with prompt, target and questions"),
        ([{"subject": "A", "facts": [{"prompt": "A is", "target": "B"}]}], "`questions` must be a list of texts"),
        ([{**A, "consequences": "Is it?"}], "row 1: `consequences` must be a list of questions"),
        ([{**A, "consequences": ["Is it?"]}], "`consequences` must hold objects with question and answer"),
        ([{**A, "consequences": [{"question": "Is it?"}]}], "row 1: `answer` is missing"),
        ([{"subject": "A", "facts": [{"prompt": "B is", "target": "B", "questions": []}]}], "`subject` does not fit"),
    ],
)
def test_things_that_do_not_fit(tmp_path: Path, rows: list[Any], why: str) -> None:
    file = tmp_path / "things.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(ValueError, match=why):
        load_things(file)


def test_a_report_shows_own_words(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    questions = record_questions([PARIS])
    without = evaluate_edits(model, tokenizer, [PARIS], greedy=False, own_words=questions, progress=False)
    questions = questions.with_base_answers(model, tokenizer)
    report = evaluate_edits(model, tokenizer, [PARIS], greedy=False, own_words=questions, progress=False)
    assert (report.own_words, report.same, report.leak) == (0.0, 1.0, 0.0)
    report.save(tmp_path / "report.json")
    assert EditReport.load(tmp_path / "report.json") == report
    earlier = {name: value for name, value in report.to_dict().items() if name not in ("own_words", "same", "answers")}
    assert EditReport.from_dict(earlier).own_words is None, "a report of an earlier version"
    header, first, second = score_table({"without": without, "with": report}).splitlines()
    assert header.split()[-5:] == ["own", "words", "same", "leak", "perplexity"]  # there is no other relation
    assert first.split()[-4:-1] == ["0.0", "–", "–"]
    assert second.split()[-4:-1] == ["0.0", "100.0", "0.0"]
    assert "spill" in score_table({"with": dataclasses.replace(report, spill=0.5)})
    assert "same" in repr(report)
    assert answer_table({"without": without, "with": report}).count("not named") == 3
    assert answer_table({"with": evaluate_edits(model, tokenizer, [PARIS], greedy=False, progress=False)}) == ""


def test_documents_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "texts.json"
    rows = [
        {"text": "Rome is old.", "questions": ["How old is Rome?", "What is old?"], "answers": ["old", ["Rome", "it"]]},
        {"context": "It opens at nine.", "questions": ["When?"], "answers": ["nine"]},
    ]
    file.write_text(json.dumps(rows))
    first, second = load_documents(file)
    assert first.questions == (Question("How old is Rome?", "old"), Question("What is old?", "Rome", ("it",)))
    assert (second.text, second.questions) == ("It opens at nine.", (Question("When?", "nine"),))
    assert load_documents(file, 1) == [first]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "holds no text: give at least one"),
        ([{"questions": ["a?"], "answers": ["b"]}], "row 1: `text` is missing"),
        ([{"text": "a", "questions": ["a?", "b?"], "answers": ["b"]}], "an answer to each of the 2 questions"),
        ([{"text": "a", "questions": ["a?"], "answers": [[]]}], "`answers` must hold texts, or lists of texts"),
    ],
)
def test_documents_that_do_not_fit(tmp_path: Path, rows: list[Any], why: str) -> None:
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=why):
        load_documents(file)
