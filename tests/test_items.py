"""Items: what they refuse, and how targets join prompts."""

from __future__ import annotations

import pytest

from memory_adapters import Document, Fact, QuestionAnswer
from memory_adapters.items import as_items


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("The capital of X is", "Rome", " Rome"),
        ("The capital of X is ", "Rome", "Rome"),
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
    with pytest.raises(ValueError, match="`question`"):
        QuestionAnswer("", "a")
    with pytest.raises(ValueError, match="`answer`"):
        QuestionAnswer("q", "")


def test_as_items() -> None:
    fact = Fact("X is", "X", "y")
    assert as_items("some text") == [Document("some text")]
    assert as_items(fact) == [fact]
    assert as_items(iter([fact, "text"])) == [fact, Document("text")]
    with pytest.raises(ValueError, match="`items` is empty"):
        as_items([])
    with pytest.raises(TypeError, match="int; this memory takes Fact, Document, QuestionAnswer"):
        as_items([fact, 3])
    with pytest.raises(TypeError, match="takes Fact"):
        as_items("text", accepted=(Fact,))
