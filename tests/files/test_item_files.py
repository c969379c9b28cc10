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
        ("a.md", "text\na", "has an unknown type: its name must end in .json, .jsonl, .csv, .txt"),
        ("a.json", '[{"text": "a"},\n{"text": "b\\ud83d"}]', r"line 2 has half of a surrogate pair, \\ud83d"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\udc00"}', r"line 2 has half of a surrogate pair, \\udc00"),
        ("a.json", '[{"text": "a"},\n{"text": "b", "text": "c"}]', "line 2 is not JSON: an object has a name twice"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b\0"}', "line 2 has a NUL byte"),
        ("a.json", f'[{{"text": {"[" * 99_999}', "is not JSON: "),
        (
            "a.json",
            '[{"prompt": "a", "target_new": "b"}]',
            "line 1 has `target_new`, the target of a fact, but no `subj",
        ),
        ("a.json", '[{"prompt": "a", "labels": "b"}]', "line 1 has `labels`, the target of a fact, but no `subject`"),
        ("a.json", '[{"text": "a", "labels": "b"}]', r"line 1 has the fields \(text, labels\)"),
        (
            "a.json",
            '[{"requested_rewrite": {"prompt": "{}", "target_new": {"str": "b"}}}]',
            "but no `requested_rewrite.subject`",
        ),
        ("a.csv", "prompt,subject,target\nA is,A,B\nA is,A,\n", "row 2: `target` of a Fact must be a non-empty string"),
        ("a.csv", "prompt;subject;target\nA is;A;B\nB is;A;B\n", "row 2: `subject='A'` is not in `prompt='B is'`"),
        ("a.csv", "prompt,subject\nA is,A\n", r"row 1 has the fields \(prompt, subject\); an item has the fields"),
        ("a.csv", "text\na, b\n", "row 1 has more cells than the header: quote a cell that holds a comma"),
        ("a.csv", "text;note\na;b;c\n", "row 1 has more cells than the header: quote a cell that holds a semicolon"),
        ("a.csv", 'text,note\na,b\n"c,d\n', r"row 2 is not CSV \(unexpected end of data\): put quotes around"),
        ("a.csv", "text\na\nb\0\n", "line 3 has a NUL byte"),
        ("a.csv", "text\n", "has no items"),
        ("a.csv", "", "has no items"),
    ],
)
def test_what_is_no_item_is_named(tmp_path: Path, name: str, content: str, why: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=why) as caught:
        read_items(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("mark", [",", ";"])
def test_csv(tmp_path: Path, mark: str) -> None:
    file = tmp_path / "items.csv"
    rows = [
        ("prompt", "subject", "target", "question", "answer", "text", "remark"),
        ("{} is in", "The Louvre", "Rome", "", "", "", "seen"),
        ("", "", "", "Who, [or] what?", "Nobody\u2028 at all"),
        ("", "", "", "", "", '"Rome wasn\'t built in a day.\nNor was Paris."'),
    ]
    if mark == ",":
        rows[2] = ("", "", "", '"Who, [or] what?"', "Nobody\u2028 at all")
    file.write_text("\n\n".join(map(mark.join, rows)), encoding="utf-8-sig")
    assert read_items(file) == ITEMS
    file.write_text(f"question{mark} answer\r\nWho?{mark} He \r\n")
    assert read_items(file) == [QuestionAnswer("Who?", "He")]
    file.write_text("text\nRome\n")
    assert read_items(file) == [Document("Rome")]


def test_what_facts_are_judged_by_is_passed_over(tmp_path: Path) -> None:
    judged = tmp_path / "facts.csv"
    judged.write_text(
        "prompt;subject;target;true_target;paraphrases;locality_prompt\n{} is in;The Louvre;Rome;Paris;a|b;\n"
    )
    assert read_items(judged) == ITEMS[:1]
    listed = tmp_path / "facts.json"
    listed.write_text(json.dumps([VALUES[0] | {"paraphrases": ["a"], "true_target": "Paris", "neighbours": []}]))
    assert read_items(listed) == ITEMS[:1]


def test_a_thing_gives_all_of_its_facts(tmp_path: Path) -> None:
    file = tmp_path / "things.jsonl"
    facts = [{"prompt": "{} sails from", "target": "Lisbon", "questions": ["Where is {}?"], "alternatives": []}]
    facts += [{"prompt": "The ship of {} is", "target": "red"}]
    thing = {"subject": "Ferry", "kind": "company", "facts": facts}
    file.write_text(f"{json.dumps(thing)}\n{json.dumps({'text': 'Rome'})}")
    expected = [Fact("{} sails from", "Ferry", "Lisbon"), Fact("The ship of {} is", "Ferry", "red"), Document("Rome")]
    assert read_items(file) == expected
    file.write_text(json.dumps({"subject": "Ferry", "facts": ["Ferry is red"]}))
    with pytest.raises(ValueError, match="line 1 has 'Ferry is red'"):
        read_items(file)


def test_aliases(tmp_path: Path) -> None:
    table, listed = tmp_path / "facts.csv", tmp_path / "facts.json"
    table.write_text(
        "prompt,subject,target,aliases,question\n{} is in,The Louvre,Rome,Louvre | Palais du Louvre,Where is {}?\n"
    )
    listed.write_text(json.dumps([VALUES[0] | {"aliases": ["Louvre", "Palais du Louvre"], "question": "Where is {}?"}]))
    assert read_items(table) == read_items(listed)
    assert read_items(table)[0].question == "Where is The Louvre?"  # type: ignore[union-attr]
    assert read_items(table)[0].aliases == ("Louvre", "Palais du Louvre")  # type: ignore[union-attr]


LOUVRE = {"prompt": "The Louvre is in", "subject": "The Louvre"}
ASKED = [{"prompt": "The Louvre is in the country of", "ground_truth": [["Italy"]]}]


@pytest.mark.parametrize(
    "row",
    [
        LOUVRE | {"target_new": "Rome", "ground_truth": [["Paris"]], "portability": {"Reasoning": ASKED}, "cond": "x"},
        LOUVRE | {"labels": "Rome", "locality": {"Relation_Specificity": ASKED}},
        {"text": "The Louvre is in", "concept": "The Louvre", "labels": "Rome"},
        {"src": "The Louvre is in", "subject": "The Louvre", "alt": "Rome", "answers": ["Paris"], "loc": "x"},
        {
            "case_id": 0,
            "requested_rewrite": {"prompt": "{} is in", "subject": "The Louvre", "target_new": {"str": "Rome"}},
            "paraphrase_prompts": [],
        },
    ],
)
def test_rows_of_data_sets_are_facts(tmp_path: Path, row: dict[str, object]) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert read_items(tmp_path / "rows.json") == ITEMS[:1]


def test_data_set_in_csv(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,concept,labels\nThe Louvre is in,The Louvre,Rome\n")
    assert read_items(file) == ITEMS[:1]
    file.write_text("text,labels\nThe Louvre is in,place\n")
    assert read_items(file) == [Document("The Louvre is in")]


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl", "a.csv"])
def test_other_bytes(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes("Rome\nMünchen".encode("latin-1"))
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        read_items(file)
    file.write_bytes("Rome".encode("utf-16-le"))
    with pytest.raises(ValueError, match="line 1 has a NUL byte"):
        read_items(file)
    with pytest.raises(FileNotFoundError):
        read_items(tmp_path / "none.txt")
