"""Items: what they refuse, and how targets join prompts."""

from __future__ import annotations

import io
import json
import unicodedata

import pytest

from memory_adapters import Document, Fact, QuestionAnswer
from memory_adapters.items import (
    RESPELLED,
    SEVERAL,
    SPACE_MOVED,
    WITHIN_WORD,
    as_items,
    item_from_dict,
    item_to_dict,
    remarks,
    without_repetitions,
)


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("The capital of X is", "Rome", " Rome"),
        ("The capital of X is ", "Rome", " Rome"),
        ("The capital of X is", " Rome", " Rome"),
        ("X 의 수도는", "로마", " 로마"),
        ("X的首都是", "罗马", "罗马"),
        ("Xの首都は", "ローマ", "ローマ"),
        ("X — столица", "Рим", " Рим"),
    ],
)
def test_continuation(prompt: str, target: str, joined: str) -> None:
    assert Fact(prompt, "X", target).continuation == joined


def test_subject_in_braces() -> None:
    assert Fact("The mother tongue of {} is", "Danielle Darrieux", "English").prompt == (
        "The mother tongue of Danielle Darrieux is"
    )


def test_subject_must_be_in_the_prompt() -> None:
    with pytest.raises(ValueError, match="`subject='Paris'`"):
        Fact("The Eiffel Tower is in", subject="Paris", target="Rome")


@pytest.mark.parametrize("field", ["prompt", "subject", "target"])
@pytest.mark.parametrize("value", ["", "  ", None])
def test_empty_fact_fields(field: str, value: str | None) -> None:
    with pytest.raises(ValueError, match=f"`{field}` of a Fact"):
        Fact(**{"prompt": "X is", "subject": "X", "target": "y", field: value})  # type: ignore[arg-type]


def test_empty_documents_and_questions() -> None:
    with pytest.raises(ValueError, match="`text`"):
        Document(" ")
    with pytest.raises(ValueError, match="`subject` of a Document"):
        Document("text", subject="")
    with pytest.raises(ValueError, match="`question`"):
        QuestionAnswer("", "a")
    with pytest.raises(ValueError, match="`answer`"):
        QuestionAnswer("q", "")


def test_as_items() -> None:
    fact = Fact("X is", "X", "y")
    assert as_items("some text") == [Document("some text")]
    about = Document("some text", subject="Text")
    assert as_items([{"text": "some text", "subject": "Text"}]) == [about] != [Document("some text")]
    assert item_from_dict(item_to_dict(about)) == about
    assert as_items(fact) == [fact]
    assert as_items(iter([fact, "text"])) == [fact, Document("text")]
    with pytest.raises(ValueError, match="`items` is empty"):
        as_items([])
    with pytest.raises(TypeError, match="int; this memory takes Fact, Document, QuestionAnswer"):
        as_items([fact, 3])
    with pytest.raises(TypeError, match="takes Fact"):
        as_items("text", accepted=(Fact,))


@pytest.mark.parametrize(
    ("prompt", "subject", "template", "remark"),
    [
        ("{} is a city; the Parisians speak", "Paris", "{} is a city; the Parisians speak", None),
        ("Paris is a city; the Parisians speak", "Paris", "{} is a city; the Parisians speak", None),
        ("{}, maker of the Apple Watch, is", "Apple", "{}, maker of the Apple Watch, is", None),
        ("Apple, maker of the Apple Watch, is", "Apple", "Apple, maker of the {} Watch, is", SEVERAL),
        ("The Parisians speak", "Paris", "The {}ians speak", WITHIN_WORD),
        ("Apple's chief is", "Apple", "{}'s chief is", None),
        ("北京市的市长是", "北京", "{}市的市长是", None),
    ],
)
def test_the_place_of_the_subject(prompt: str, subject: str, template: str, remark: str | None) -> None:
    fact = Fact(prompt, subject, "so")
    assert fact.template == template
    assert fact.prompt[fact.subject_start : fact.subject_end] == subject
    assert fact.about("Oslo") == template.replace("{}", "Oslo")
    assert remarks([fact, Document("text")]) == ([f"1 of 2 items: {remark} (first: {fact.prompt!r})"] if remark else [])
    again = item_from_dict(json.loads(json.dumps(item_to_dict(fact))))
    assert (again, again.subject_start) == (fact, fact.subject_start)  # type: ignore[union-attr]


def test_a_space_at_the_end_of_a_prompt_is_moved_and_said() -> None:
    fact, question = Fact("X is a ", "X", "y"), QuestionAnswer("Who is it? ", "Bo")
    assert (fact.prompt, fact.continuation) == ("X is a", " y")
    assert (question.question, question.continuation) == ("Who is it?", " Bo")
    assert remarks([fact, question]) == [f"2 of 2 items: {SPACE_MOVED} (first: 'X is a')"]
    assert Fact("X is\n", "X", "y").continuation == "y"


def test_spellings_that_look_alike_are_equal() -> None:
    for prompt in (
        unicodedata.normalize("NFD", "Café Zürich is in"),
        "Café\u00a0Zürich is in",
        "Café\u2009Zürich is in",
    ):
        fact = Fact(prompt, "Café Zürich", "Rome")
        assert fact.prompt == "Café Zürich is in"
        assert remarks([fact]) == [f"1 of 1 items: {RESPELLED} (first: {fact.prompt!r})"]
    with pytest.raises(ValueError, match="it is there, but differs in capital letters"):
        Fact("The eiffel tower is in", "Eiffel Tower", "Rome")
    with pytest.raises(ValueError, match="characters that cannot be seen"):
        Fact("The Eiffel\u200b Tower is in", "Eiffel Tower", "Rome")
    with pytest.raises(ValueError, match=r"`prompt='She was born in'`: name it there"):
        Fact("She was born in", "Ada", "Rome")


@pytest.mark.parametrize(
    ("prompt", "target", "continuation"),
    [
        ("X rose by 100", "%", "%"),
        ("X costs $", "5", "5"),
        ("X is called (", "Y", "Y"),
        ('X said "', "Yes", "Yes"),
        ('The "X" is', "old", " old"),
        ("X runs on", ".NET", " .NET"),
        ("X", "'s hat", "'s hat"),
        ("ราชา X คือ", "ลาว", "ลาว"),
    ],
)
def test_what_needs_no_space_gets_none(prompt: str, target: str, continuation: str) -> None:
    assert Fact(prompt, "X", target).continuation == continuation


def test_a_separator_says_what_joins() -> None:
    assert Fact("X-", "X", "ray", separator="").continuation == "ray"
    assert item_from_dict(item_to_dict(Fact("X is", "X", "y", separator=""))) == Fact("X is", "X", "y", separator="")
    with pytest.raises(ValueError, match="`separator`"):
        Fact("X is", "X", "y", separator=3)  # type: ignore[arg-type]


def test_a_question_of_a_fact_names_its_subject() -> None:
    for question in ("Who founded Ex? ", "Who founded {}?", "Who founded ex?"):
        fact = Fact("{} was founded by", "Ex", "Y", question=question)
        assert fact.question is not None
        assert fact.question.casefold() == "who founded ex?"
        assert item_from_dict(item_to_dict(fact)) == fact
    assert Fact("{} was founded by", "X", "Y", aliases=("Ex",), question="Who founded Ex?").question
    for wrong in ("", "Who founded it?", 3):
        with pytest.raises(ValueError, match="`question"):
            Fact("{} was founded by", "Ex", "Y", question=wrong)  # type: ignore[arg-type]


def test_aliases() -> None:
    fact = Fact("X is", "X", "y", aliases=["Ex", "Iks"])  # type: ignore[arg-type]
    assert fact.aliases == ("Ex", "Iks")
    assert item_from_dict(json.loads(json.dumps(item_to_dict(fact)))) == fact
    for wrong in ("Ex", [""], [3]):
        with pytest.raises(ValueError, match="`aliases`"):
            Fact("X is", "X", "y", aliases=wrong)  # type: ignore[arg-type]


def test_half_a_surrogate_pair_is_refused() -> None:
    for make in (lambda text: Fact(f"X {text} is", "X", "y"), Document, lambda text: QuestionAnswer("Who?", text)):
        with pytest.raises(ValueError, match="half of a surrogate pair at index"):
            make("a\ud83d b")


def test_dictionaries_are_items_and_anything_else_is_refused() -> None:
    fact = {"prompt": "{} is", "subject": "X", "target": "y"}
    assert as_items(fact) == [Fact("X is", "X", "y")]
    assert as_items([{"text": "a b"}, {"question": "Who?", "answer": "Bo"}]) == [
        Document("a b"),
        QuestionAnswer("Who?", "Bo"),
    ]
    with pytest.raises(ValueError, match="`target` of a Fact"):
        as_items({**fact, "target": ""})
    for wrong in (
        {"question": "answer"},
        {"prompt": "x"},
        {"Who is it?": "Bo"},
        b"bytes",
        3,
        [fact, 3],
        io.StringIO("a"),
    ):
        with pytest.raises(TypeError, match="`items`"):
            as_items(wrong)  # type: ignore[arg-type]


def test_what_a_separator_is_given_for_is_left_as_it_is() -> None:
    fact = Fact("{} is ", "Rome", "old", separator="")
    assert fact.prompt + fact.continuation == "Rome is old"
    assert remarks([fact]) == []


@pytest.mark.parametrize("text", ["दिल्ली है", "दिल्लीः है"])
def test_a_letter_with_a_mark_goes_on_with_its_word(text: str) -> None:
    assert remarks([Fact(text, "दिल्ल", "x")]) == [f"1 of 1 items: {WITHIN_WORD} (first: {text!r})"]


def test_signs_that_open_and_close() -> None:
    assert Fact("{} is called '", "Rome", "Roma").continuation == "Roma"
    assert Fact("{}'s chief's", "Rome", "x").continuation == " x"
    assert Fact("{} likes", "Bob", "🍕").continuation == " 🍕"
    assert Fact("{} did", "He", "n't").continuation == "n't"


def test_text_that_cannot_be_seen_and_names_of_files_are_refused() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        Document("\u200b")
    with pytest.raises(TypeError, match=r"'facts.json', which names a file"):
        as_items("facts.json")
    assert as_items("Read facts.json first") == [Document("Read facts.json first")]


def test_repetitions_are_left_out_and_contradictions_refused() -> None:
    fact, other = (Fact("X is", "X", target) for target in ("y", "z"))
    assert without_repetitions([fact, fact, Document("a"), Document("a")]) == (
        [fact, Document("a")],
        ["2 repeated item(s) left out"],
    )
    with pytest.raises(ValueError, match=r"contradict each other \('X is': 'y', 'z'\)"):
        without_repetitions([fact, other])
    with pytest.raises(ValueError, match="contradict"):
        without_repetitions([QuestionAnswer("Who?", "A"), QuestionAnswer("Who?", "B")])
