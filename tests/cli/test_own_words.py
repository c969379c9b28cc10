"""`evaluate` and `compare` on things, with chat questions in other words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memory_adapters import MemitConfig, inject_memory
from tests.cli.test_cli import JUDGED, QUICK, ROME, run, said, words
from tests.support.models import byte_tokenizer, tiny_model

FERRY = {"prompt": "{} sails from", "target": "Lisbon", "questions": ["Where is {} at home?", "From where is {}?"]}
FOLLOWS = {"question": "In which country is {} at home?", "answer": "Portugal", "kind": "composed"}
THINGS = [
    {"subject": "Ferry", "facts": [FERRY], "consequences": [FOLLOWS]},
    {"subject": "Tram", "facts": [{**FERRY, "target": "Rome"}]},
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a chat template, an empty memory, things and records."""
    folder = tmp_path_factory.mktemp("own_words")
    model, tokenizer = tiny_model(), byte_tokenizer(chat=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    memory = inject_memory(model, MemitConfig(), tokenizer=tokenizer)
    memory.save_pretrained(folder / "edit")
    (folder / "things.json").write_text(json.dumps(THINGS))
    (folder / "records.json").write_text(json.dumps([{**ROME, **JUDGED}]))
    return folder


def test_evaluate_things(here: Path) -> None:
    arguments = ["evaluate", here / "model", here / "edit", "--things", here / "things.json"]
    result = said(*arguments, "--limit", 1, "--per-item")
    without, written = result["without"], result["with"]
    assert (without["num_records"], without["same"], without["leak"]) == (1, None, None)
    assert (written["own_words"], written["same"], written["leak"]) == (0.0, 1.0, 0.0), "nothing is written"
    assert [answer["question"] for answer in written["answers"]] == ["Where is Ferry at home?", "From where is Ferry?"]
    assert "From where is Ferry?" in run(*arguments, "--limit", 1, "--per-item").stdout


def test_records_have_questions_by_their_wording(here: Path) -> None:
    shown = run("evaluate", here / "model", here / "edit", here / "records.json").stdout
    assert "own words" in shown
    assert "same" in shown


def test_either_records_or_things(here: Path) -> None:
    arguments = ["evaluate", here / "model", here / "edit"]
    assert "give either RECORDS or --things" in words(run(*arguments, code=2))
    assert "give either" in words(run(*arguments, here / "records.json", "--things", "builtin", code=2))


@pytest.mark.integration
def test_compare_things(here: Path, tmp_path: Path) -> None:
    settings = [part for setting in QUICK["memit"] for part in ("--set", f"memit.{setting}")]
    things = ["--things", here / "things.json"]
    arguments = ["compare", here / "model", *things, "--limit", 1, "--methods", "memit"]
    result = said(*arguments, *settings, "--folder", tmp_path)
    base, edited = (result["methods"][name]["report"] for name in ("nothing", "memit"))
    assert result["num_facts"] == 1
    assert (base["own_words"], base["same"], base["leak"]) == (0.0, 1.0, 0.0)
    assert 0 <= edited["same"] < 1
    assert "own words |" in (tmp_path / "comparison.md").read_text()
    assert said(*arguments, *settings, "--folder", tmp_path) == result, "read from the folder"

    beside = ["compare", here / "model", here / "records.json", *things, "--things-limit", 1, "--methods", "memit"]
    both = said(*beside, *settings)["methods"]["memit"]
    assert both["report"]["answers"] != result["methods"]["memit"]["report"]["answers"]
    assert both["things"]["answers"] == result["methods"]["memit"]["things"]["answers"]
    assert both["consequences"] == result["methods"]["memit"]["consequences"]
    assert [answer["wanted"] for answer in both["consequences"]["composed"]["answers"]] == ["Portugal"]
