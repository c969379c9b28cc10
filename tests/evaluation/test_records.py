"""Edits read from CounterFact, zsRE and the user's own files; rows that do not fit are named."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memory_adapters import Fact, read_items
from memory_adapters.evaluation.records import EditRecord, Question, load_counterfact, load_facts, load_zsre

FLAT = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "subject": "Danielle Darrieux",
    "target_new": "English",
    "ground_truth": "French",
    "rephrase_prompt": "Danielle Darrieux spoke the language",
    "locality_prompt": "Michel Rocard is a native speaker of",
    "locality_ground_truth": "French",
}
NESTED = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux spoke the language", "Danielle Darrieux, a native"],
    "neighborhood_prompts": ["Michel Rocard is a native speaker of", "The native language of Montesquieu is"],
    "attribute_prompts": ["The mother tongue of Douglas Adams is"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}
ZSRE = {
    "subject": "Shmavon Shmavonyan",
    "src": "What country is Shmavon Shmavonyan from?",
    "pred": "Israel",
    "rephrase": "Which country is Shmavon Shmavonyan from?",
    "alt": "Yemen",
    "answers": ["Armenia", "Republic of Armenia"],
    "loc": "nq question: who sang nice day for a white wedding",
    "loc_ans": "Billy Idol",
    "portability": {"New Question": "What is the capital of his home country?", "New Answer": "Sana'a"},
}
LOADERS = {"flat": (load_counterfact, FLAT), "nested": (load_counterfact, NESTED), "zsre": (load_zsre, ZSRE)}
Loader = Callable[..., list[EditRecord]]


def written(path: Path, *rows: Any) -> Path:
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    return path


def test_counterfact_flat(tmp_path: Path) -> None:
    (record,) = load_counterfact(written(tmp_path / "edit.json", FLAT))
    assert record == EditRecord(
        Fact(FLAT["prompt"], "Danielle Darrieux", "English"),
        "French",
        ("Danielle Darrieux spoke the language",),
        (("Michel Rocard is a native speaker of", "French"),),
        "The mother tongue of {} is",
    )


def test_counterfact_as_it_was_published(tmp_path: Path) -> None:
    (record,) = load_counterfact(written(tmp_path / "counterfact.json", NESTED))
    assert record == EditRecord(
        Fact("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"),
        "French",
        ("Danielle Darrieux spoke the language", "Danielle Darrieux, a native"),
        (("Michel Rocard is a native speaker of", "French"), ("The native language of Montesquieu is", "French")),
        "P103",
        generation_prompts=("Danielle Darrieux's mother tongue is",),
    )


def test_zsre(tmp_path: Path) -> None:
    (record,) = load_zsre(written(tmp_path / "zsre.json", ZSRE))
    assert record == EditRecord(
        Fact(ZSRE["src"], "Shmavon Shmavonyan", "Yemen"),
        "Armenia",
        ("Which country is Shmavon Shmavonyan from?",),
        (("nq question: who sang nice day for a white wedding?", "Billy Idol"),),
        "What country is {} from?",
        (("What is the capital of his home country?", "Sana'a"),),
    )
    without = {name: value for name, value in ZSRE.items() if name != "portability"} | {"loc": "Who sang?"}
    (record,) = load_zsre(written(tmp_path / "zsre.json", without))
    assert record.portability == ()
    assert record.neighbours == (("Who sang?", "Billy Idol"),)
    empty = ZSRE | {"portability": {"New Question": None, "New Answer": None}}
    assert load_zsre(written(tmp_path / "zsre.json", empty))[0].portability == ()


LOUVRE = EditRecord(
    Fact("The Louvre is in", "The Louvre", "Rome"),
    "Paris",
    ("To see The Louvre go to", "You find The Louvre in"),
    (("Notre-Dame is in", "Paris"), ("Big Ben is in", "London")),
    "place",
)


def test_own_facts_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(
        "\ufeffprompt,subject,target,true_target,paraphrases,neighbors,relation,remark\n"
        "{} is in,The Louvre,Rome,Paris,To see {} go to | You find {} in,Notre-Dame is in|Big Ben is in => London,"
        "place,seen\n\n"
        '"Ada, Countess of Lovelace, wrote in",Ada, French ,,,,,\n',
        encoding="utf-8",
    )
    louvre, ada = load_facts(path)
    assert louvre == LOUVRE
    assert ada == EditRecord(Fact("Ada, Countess of Lovelace, wrote in", "Ada", "French"))
    assert ada.true_target is None
    assert ada.relation == "{}, Countess of Lovelace, wrote in"


def test_a_question_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("subject,question,target,paraphrase\nThe Louvre,Where is {}?,Rome,In which city is {}?\n")
    fact = Fact("Where is The Louvre?", "The Louvre", "Rome")
    assert load_facts(path) == [EditRecord(fact, paraphrases=("In which city is The Louvre?",))]
    assert read_items(path) == [fact]


@pytest.mark.parametrize("name", ["facts.json", "facts.jsonl"])
def test_own_facts_in_json(tmp_path: Path, name: str) -> None:
    fields = {"prompt": "{} is in", "subject": "The Louvre", "target": "Rome", "true_target": "Paris"}
    fields |= {"relation": "place"}
    listed = {
        "paraphrases": ["To see {} go to", "You find {} in"],
        "neighbours": ["Notre-Dame is in", ["Big Ben is in", "London"]],
    }
    barred = {
        "paraphrase": "To see {} go to|You find {} in",
        "neighbour": "Notre-Dame is in => Paris | Big Ben is in => London",
    }
    assert load_facts(written(tmp_path / name, fields | listed, fields | barred)) == [LOUVRE, LOUVRE]


def test_aliases_and_separator(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("prompt,subject,target,aliases,separator\n{} is in,The Louvre,Rome,Louvre|Palais,\n")
    (fact,) = (record.fact for record in load_facts(path))
    assert (fact.aliases, fact.separator) == (("Louvre", "Palais"), None)
    row = {"prompt": "{} is in", "subject": "The Louvre", "target": "Rome", "separator": "", "aliases": ["Louvre"]}
    (fact,) = (record.fact for record in load_facts(written(tmp_path / "facts.json", row)))
    assert (fact.aliases, fact.separator) == (("Louvre",), "")


def test_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("prompt;subject;target;true_target\n{} is, today, in;The Louvre;Rome;Paris\n", encoding="utf-8-sig")
    assert load_facts(path) == [EditRecord(Fact("The Louvre is, today, in", "The Louvre", "Rome"), "Paris")]


KNOW = {
    "subject": "Leo",
    "prompt": "Where was Leo born?",
    "target_new": "Bonn",
    "ground_truth": [["Kiel", "Kiel, Germany"]],
    "rephrase": "What is the place of birth of {}?",
    "portability": {
        "Reasoning": [
            {"prompt": "In which country was Leo born?", "ground_truth": [["Germany", "FRG"], ["Germany"]]},
            {"prompt": "Who knows?", "ground_truth": [[]]},
        ],
        "Subject_Aliasing": [{"prompt": "Where was Leopold born?", "ground_truth": "Bonn"}],
        "Logical_Generalization": [],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The father of Leo is", "ground_truth": ["Karl"]}],
        "Forgetfulness": None,
    },
    "cond": "passed over",
}
LEO = EditRecord(
    Fact("Where was Leo born?", "Leo", "Bonn"),
    "Kiel",
    ("What is the place of birth of Leo?",),
    (Question("The father of Leo is", "Karl", (), "Relation_Specificity"),),
    portability=(
        Question("In which country was Leo born?", "Germany", ("FRG",), "Reasoning"),
        Question("Where was Leopold born?", "Bonn", (), "Subject_Aliasing"),
    ),
)


def test_knowedit(tmp_path: Path) -> None:
    (record,) = load_facts(written(tmp_path / "know.json", KNOW))
    assert record == LEO
    renamed = {name: value for name, value in KNOW.items() if name not in ("target_new", "rephrase", "ground_truth")}
    renamed |= {"labels": "Bonn", "rephrase_prompt": [KNOW["rephrase"]], "ground_truth": "Kiel"}
    assert load_facts(written(tmp_path / "know.json", renamed)) == [LEO]
    biography = {"concept": "leo", "text": "This is about leo.", "labels": "Leo is a painter.", "locality": {}}
    (record,) = load_facts(written(tmp_path / "bio.jsonl", biography))
    assert record == EditRecord(Fact("This is about leo.", "leo", "Leo is a painter."))


def test_easyedit(tmp_path: Path) -> None:
    row = {"prompt": "Ray Charles, the", "subject": "Ray Charles", "target_new": "violin", "ground_truth": "piano"}
    fact = Fact("Ray Charles, the", "Ray Charles", "violin")
    neighbours = {"prompt": ["Bach plays the", "Liszt plays the"], "ground_truth": ["organ", ["piano", "grand piano"]]}
    inputs = {"locality_inputs": {"neighborhood": neighbours}, "rephrase_prompts": ["Ray Charles plays the"]}
    inputs |= {"portability_inputs": {"one_hop": {"prompt": "It has strings:", "ground_truth": "yes"}}}
    flat = {"locality_prompt": "Bach plays the", "locality_ground_truth": "organ"}
    flat |= {"portability": {"New Question": "Strings?", "New Answer": "yes"}}
    path = written(tmp_path / "rows.json", row, row | inputs, row | flat, row | {"portability": {"New Question": "a"}})
    alone, kinds, single = load_facts(path, 3)
    assert alone == EditRecord(fact, "piano")
    assert kinds.paraphrases == ("Ray Charles plays the",)
    assert kinds.neighbours == (
        Question("Bach plays the", "organ", (), "neighborhood"),
        Question("Liszt plays the", "piano", ("grand piano",), "neighborhood"),
    )
    assert kinds.portability == (Question("It has strings:", "yes", (), "one_hop"),)
    assert single.neighbours == (Question("Bach plays the", "organ"),)
    assert single.portability == (("Strings?", "yes"),)
    with pytest.raises(ValueError, match=r"row 4: `portability\.New Answer` is missing"):
        load_facts(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"target_new": None}, "`target` is missing; the row has subject, prompt"),
        ({"subject": None}, "`subject` is missing"),
        ({"target_new": ["a", "b"]}, "`target_new` must be a non-empty text, got ['a', 'b']"),
        ({"ground_truth": 7}, "`ground_truth` must be a non-empty text, got 7"),
        ({"ground_truth": [["a", 7]]}, "`ground_truth` must be a non-empty text, got 7"),
        ({"rephrase": {"a": "b"}}, "`rephrase` must be a text or a list"),
        ({"rephrase": ["a\ud83d"]}, "`rephrase` has half of a surrogate pair"),
        ({"portability": "a"}, "`portability` must map kinds to lists of"),
        ({"portability": {"Reasoning": "a"}}, "`portability.Reasoning` must be a list of"),
        ({"locality": {"Forgetfulness": ["a"]}}, "`locality.Forgetfulness` must hold"),
        ({"locality": {"Forgetfulness": [{"prompt": "a"}]}}, "`locality.Forgetfulness` must hold"),
        (
            {"locality": {"a": {"prompt": ["b", "c"], "ground_truth": ["d"]}}},
            "`locality.a` must have a `ground_truth` for",
        ),
        ({"locality": {"a": [{"prompt": "", "ground_truth": "d"}]}}, "`locality.a` must be a non-empty text, got ''"),
    ],
)
def test_a_bad_row_of_knowedit_is_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = written(tmp_path / "rows.jsonl", KNOW, KNOW | change)
    with pytest.raises(ValueError, match=re.escape(f"`{path}`, row 2: {problem}")):
        load_facts(path)


@pytest.mark.parametrize("name", LOADERS)
def test_limit(tmp_path: Path, name: str) -> None:
    loader, row = LOADERS[name]
    path = written(tmp_path / "rows.jsonl", row, row, {"broken": 1})
    assert len(loader(path, 2)) == 2
    assert loader(path, limit=0) == []
    with pytest.raises(ValueError, match="row 3"):
        loader(path, 3)
    with pytest.raises(ValueError, match="`limit=-1`"):
        loader(path, -1)


def changed(row: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    row = copy.deepcopy(row)
    *outer, last = field.split(".")
    inner = row
    for name in outer:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return row


@pytest.mark.parametrize(
    ("name", "field", "value", "problem"),
    [
        ("flat", "target_new", None, "is missing; the row has case_id, prompt"),
        ("flat", "ground_truth", " ", "non-empty text, got ' '"),
        ("flat", "locality_prompt", 7, "non-empty text, got 7"),
        ("flat", "rephrase_prompt", ["one"], "non-empty text, got"),
        ("flat", "subject", "Michel Rocard", "put {} in its place"),
        ("nested", "requested_rewrite.target_new", None, "is missing"),
        ("nested", "requested_rewrite.target_true.str", "", "non-empty text"),
        ("nested", "paraphrase_prompts", "one", "must be a list of texts, got 'one'"),
        ("nested", "neighborhood_prompts", ["one", None], "non-empty text, got None"),
        ("nested", "requested_rewrite.relation_id", 103, "non-empty text, got 103"),
        ("nested", "generation_prompts", "one", "must be a list of texts"),
        ("zsre", "alt", None, "is missing"),
        ("zsre", "answers", [], "at least one text"),
        ("zsre", "loc_ans", None, "is missing"),
        ("zsre", "portability.New Answer", None, "is missing"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, field: str, value: Any, problem: str) -> None:
    loader, row = LOADERS[name]
    path = written(tmp_path / "rows.json", row, changed(row, field, value))
    with pytest.raises(ValueError, match=re.escape(f"`{path}`, row 2: `{field}")) as caught:
        loader(path)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prompt,subject\nThe Louvre is in,The Louvre\n", "row 1: `target` is missing; the row has prompt, subject"),
        ("prompt,subject,target\nThe Louvre is in,The Louvre\n", "row 1: `target` must be a non-empty text"),
        ("prompt,subject,target\nThe Louvre, Paris, is in,The Louvre,Rome\n", "row 1 has more cells than the header"),
        ("prompt,subject,target,neighbour\nA is,A,B,C is\n", "row 1: `neighbour` has no answer, and the row no"),
        ("prompt,subject,target,neighbours\nA is,A,B,C is =>\n", "row 1: `neighbours` must be a non-empty text"),
    ],
)
def test_a_bad_row_of_ones_own_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"facts\.csv`, {problem}"):
        load_facts(path)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("rows.json", '{"prompt": "A"}\n{"prompt": "B"}', r"is not JSON: .*line 2.*name it \.jsonl"),
        ("rows.json", '{"data": []}', "must hold a list of records, got a dict"),
        ("rows.json", '["text"]', "row 1 must map fields to values"),
        ("rows.jsonl", '{"prompt": "A"', "row 1 is not JSON"),
        ("rows.json", "[" * 99_999, "is not JSON"),
        ("rows.jsonl", '{"prompt": "A\0"}', "line 1 has a NUL byte"),
        ("rows.csv", "prompt,subject\nA,B\0\n", "line 2 has a NUL byte"),
        ("rows.csv", 'prompt,subject\n"A,B\n', r"row 1 is not CSV \(unexpected end of data\)"),
        (
            "rows.json",
            '[{"prompt": "A is", "subject": "A", "target": "B\\ud83d"}]',
            "row 1: `target` has half of a surrogate pair",
        ),
        ("rows.jsonl", '{"neighbours": [["one"]], "prompt": "A is", "subject": "A", "target": "B"}', "`neighbours`"),
        (
            "rows.jsonl",
            '{"paraphrases": 3, "prompt": "A is", "subject": "A", "target": "B"}',
            "a list, got 3",
        ),
        ("rows.txt", "", r"of no known type: name it \.json, \.jsonl, \.csv"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=problem) as caught:
        load_facts(str(tmp_path / name))
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_other_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("prompt\nMünchen".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}`, line 2 is not UTF-8"):
        load_facts(tmp_path / name)


def test_a_missing_file(tmp_path: Path) -> None:
    for source in ("no/such.json", tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="id of a data set on the Hub"):
            load_counterfact(source)


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return [NESTED, FLAT, {"broken": 1}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    records = load_counterfact("someone/counterfact", 2, split="test")
    assert asked == [("someone/counterfact", "test")]
    assert [record.relation for record in records] == ["P103", "The mother tongue of {} is"]
    with pytest.raises(ValueError, match="`someone/counterfact`, row 3: `prompt` is missing"):
        load_counterfact("someone/counterfact")


def test_without_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install memory-adapters\[evaluation\]"):
        load_zsre("someone/zsre")


def test_real_counterfact(data: Path) -> None:
    records = load_counterfact(data / "counterfact" / "edit.json")
    assert len(records) == 10_000
    assert records[1].fact == Fact("The official religion of Edwin of Northumbria is", "Edwin of Northumbria", "Islam")
    assert records[1].neighbours == (("The official religion of Paul is", "Christianity"),)
    assert len({record.relation for record in records}) == 213
    assert all("{}" in record.relation and record.fact.target != record.true_target for record in records)


def test_real_zsre(data: Path) -> None:
    records = load_zsre(data / "zsre" / "edit.json")
    assert len(records) == 1037
    assert records[0].fact.target == "2006"
    assert records[0].true_target == "1998"
    assert all(len(r.portability) == len(r.neighbours) == len(r.paraphrases) == 1 for r in records)
    assert all(r.neighbours[0][0].endswith("?") for r in records)
