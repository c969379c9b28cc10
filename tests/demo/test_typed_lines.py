"""Facts and questions that somebody types."""

from __future__ import annotations

import pytest

from memory_adapters import Fact, QuestionAnswer
from memory_adapters.demo.typed_lines import parse_lines

LINES = """
  Lumen Ferry | {} is at home in | Lisbon
Lumen Ferry|The ships of Lumen Ferry run on|methanol

What is the wifi code? 7351
谁建造了灯塔？艾格尼丝
The wifi code of the library | it is 7351
"""


def test_facts_and_questions() -> None:
    assert parse_lines(LINES) == [
        Fact("{} is at home in", "Lumen Ferry", "Lisbon"),
        Fact("The ships of {} run on", "Lumen Ferry", "methanol"),
        QuestionAnswer("What is the wifi code?", "7351"),
        QuestionAnswer("谁建造了灯塔？", "艾格尼丝"),
        QuestionAnswer("The wifi code of the library", "it is 7351"),
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "There is no line: write `subject"),
        ("a? b\nLisbon is a city.", "^Line 2: 'Lisbon is a city.' is neither a fact nor a question"),
        ("Who?", "'Who\\?' is neither"),
        ("a | b | c | d", "'a | b | c | d' is neither"),
        ("Lumen | The ships run on | oil", "^Line 1: `subject='Lumen'` is not in `prompt='The ships run on'`"),
        ("Lumen | {} is in |", "^Line 1: `target` of a Fact must be a non-empty string"),
    ],
)
def test_a_line_that_is_neither_is_named(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_lines(text)
