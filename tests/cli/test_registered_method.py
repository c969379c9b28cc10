"""A method that the command line knows by its registration alone is written, described, scored and compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from memory_adapters import MemitConfig, MemitMemory, registry
from memory_adapters.config import MemoryPeftType
from memory_adapters.memory import Outcome
from memory_adapters.registry import Variant, methods, register_method
from tests.cli.test_cli import ANY_RECALL, JUDGED, PIANO, QUICK, ROME, run, said, words
from tests.support.models import byte_tokenizer, tiny_model


@dataclass
class ToyConfig(MemitConfig):
    """Configure an edit under another name."""

    method_name: ClassVar[str] = "Toy"
    kind: ClassVar[MemoryPeftType] = MemoryPeftType("TOY")


class ToyMemory(MemitMemory):
    """Write an edit; an option of its own is noted in the report."""

    def _write(self, items: Sequence[Any], rows: Sequence[Any], *, progress: bool, remark: Any = None) -> Outcome:
        outcome = super()._write(items, rows, progress=progress)
        return Outcome(outcome.losses, [*outcome.notes, f"remark: {remark!r}"])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and records, while the toy is registered."""
    monkeypatch.setattr(registry, "_METHODS", methods())
    variants = {"toy": Variant(), "more": Variant({"steps": 1}, {"remark": "more"}, start="saved")}
    register_method("toy", ToyConfig, ToyMemory, variants=variants)
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Rome was not built in a day.")
    (tmp_path / "facts.json").write_text(json.dumps([ROME]))
    (tmp_path / "records.json").write_text(json.dumps([{**ROME, **JUDGED}, {**PIANO, "true_target": "trumpet"}]))
    return tmp_path


def quick(prefix: str = "") -> list[str]:
    return [part for setting in QUICK["memit"] for part in ("--set", f"{prefix}{setting}")]


def test_written_described_and_scored(here: Path) -> None:
    arguments = ["write", here / "model", here / "facts.json", "--output", here / "toy", *ANY_RECALL]
    refused = run(*arguments, "--method", "toy", "--option", "covariance=c0", code=2)
    assert "has no option `covariance`; it has remark" in words(refused)
    report = said(*arguments, "--method", "toy", *quick(), "--option", 'remark={"as": "JSON"}')
    assert report["method"] == "Toy"
    assert "remark: {'as': 'JSON'}" in report["notes"]
    more = said(*arguments, "--adapter", here / "toy", "--option", "remark=as a text", "--set", "steps=1")
    assert "remark: 'as a text'" in more["notes"]
    known = said("info", here / "toy", "--model", here / "model")
    assert (known["method"], known["name"], known["fits"]) == ("toy", "Toy", True)
    assert known["settings"]["steps"] == 1
    assert [item["target"] for item in known["items"]] == ["Rome"]
    assert len(known["writes"]) == 2
    scores = said("evaluate", here / "model", here / "toy", here / "records.json")
    assert scores["with"]["scores"]["efficacy"] >= scores["without"]["scores"]["efficacy"]
    made = said("export", here / "toy", "--model", here / "model", "--format", "vllm", "--output", here / "vllm")
    assert made["output"] == str(here / "vllm")


def test_compared(here: Path) -> None:
    run(
        "write",
        here / "model",
        here / "facts.json",
        "--method",
        "toy",
        "--output",
        here / "saved",
        *quick(),
        *ANY_RECALL,
    )
    arguments = ["compare", here / "model", here / "records.json", "--limit", 1, "--text", here / "text.txt"]
    refused = run(*arguments, "--methods", "toy,more", code=2)
    assert "more starts from a saved memory: give one with --start toy=ADAPTER" in words(refused)
    start = ["--methods", "toy,more", "--start", f"toy={here / 'saved'}", "--set", "toy.remark=of the method"]
    found = said(*arguments, *start, *quick("toy."))["methods"]
    assert list(found) == ["nothing", "toy", "more"]
    notes = [found[name]["write"]["notes"] for name in ("toy", "more")]
    # The second variant has a remark of its own, which what is set for the method does not change.
    remarks = [[note for note in own if note.startswith("remark: ")] for own in notes]
    assert remarks == [["remark: 'of the method'"], ["remark: 'more'"]]
    assert all("written already" in " ".join(own) for own in notes), (
        "both start from the saved memory, which has the fact"
    )
    assert found["toy"]["report"]["perplexity"] != found["nothing"]["report"]["perplexity"]
