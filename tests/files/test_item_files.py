"""Files of items: what they hold, and what is said of those that hold something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memory_adapters import Document, Fact, QuestionAnswer
from memory_adapters.files.item_files import read_items

VALUES = [
    {"prompt": "{} is in", "subject": "The Louvre", "target": "Rome"},
    {"question": "Who, [or] what?", "answer": "Nobody\u2028 at all"},
    {"text": "Rome wasn't built in a day.\nNor was Paris."},
]
ITEMS = [
    Fact("The Louvre is in", "The Louvre", "Rome"),
    QuestionAnswer(*VALUES[1].values()),
    Document(*VALUES[2].values()),
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_and_jsonl(tmp_path: Path, indent: int | None, ascii_only: bool) -> None:
    listed, lines = tmp_path / "items.JSON", tmp_path / "items.jsonl"
    listed.write_text(f" {json.dumps(VALUES, indent=indent, ensure_ascii=ascii_only)}\n", encoding="utf-8-sig")
    rows = [json.dumps(value, ensure_ascii=ascii_only) for value in VALUES]
    lines.write_bytes("\r\n\n".join(rows).encode())
    assert read_items(listed) == read_items(str(lines)) == ITEMS


def test_text_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "passage.txt"
    file.write_text("Rome wasn't built in a day.\nNor was Paris.")
    assert read_items(file) == [ITEMS[2]]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (
            "a.json",
            '[{"text": "a"},\n\n {"text": "b", "id": 1}]',
            r"line 3 has the fields \(text, id\); an item has the fields \(prompt, subject, target\)",
        ),
        ("a.json", '[\n{"text": "a"}, "b"]', "line 2 has 'b'; an item has"),
        ("a.json", '[\n {"text": [1]}\n]', r"line 2: `text` of a Document must be a non-empty string, got \[1\]"),
        ("a.json", '[{"prompt": "a", "subject": "b", "target": "c"}]', "line 1: `subject='b'` is not in `prompt='a'`"),
        ("a.json", '[{"text": "a"},\n {"text": }]', r"not JSON: Expecting value: line 2 .*If each line .* \.jsonl"),
        ("a.json", '{"text": "a"}', "must be a list of items, got a dict"),
        ("a.json", "[]", "has no items"),
        ("a.json", "[{}]", r"line 1 has the fields \(\)"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"', r"line 3 is not JSON: .* \(column 13\)"),
        ("a.jsonl", '{"text": "a"}\n{"question": "a"}', r"line 2 has the fields \(question\)"),
        ("a.jsonl", "\n", "has no items"),
        ("a.txt", " \n", "line 1: `text` of a Document must be a non-empty string"),
        ("a.csv", "text\na", "has an unknown type: its name must end in .json, .jsonl, .txt"),
    ],
)
def test_what_is_no_item_is_named(tmp_path: Path, name: str, content: str, why: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=why) as caught:
        read_items(file)
    assert str(file) in str(caught.value)


def test_other_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("Rome\nMünchen".encode("latin-1"))
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        read_items(file)
    with pytest.raises(FileNotFoundError):
        read_items(tmp_path / "none.txt")
