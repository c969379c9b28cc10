"""The report of a set of edits: what is in it, how it is shown, saved and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memory_adapters import Fact, MemitConfig, inject_memory
from memory_adapters.evaluation.edit_report import (
    EditReport,
    compare,
    evaluate_edits,
    item_table,
    kind_table,
    score_table,
)
from memory_adapters.evaluation.records import EditRecord, Question
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.evaluation.scores.perplexity import perplexity
from tests.support.bigrams import LOUVRE, MINE, TOWER, Bigrams, word_tokenizer
from tests.support.models import byte_tokenizer, tiny_model

ROME = EditRecord(Fact("The Louvre is in", "The Louvre", "Rome"), "Paris", ("To see The Louvre go to",))
LATIN = EditRecord(Fact("Ada spoke", "Ada", "Latin"), "English", ("Ada wrote in",), (("Ida spoke", "English"),))


@pytest.fixture
def words() -> Any:
    return word_tokenizer()


@pytest.fixture
def tiny() -> tuple[Any, Any]:
    return tiny_model(), byte_tokenizer()


def test_report_holds_what_was_measured(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    text = "The Louvre is a museum, and what else it is nobody knows. " * 4
    report = evaluate_edits(
        model, tokenizer, [ROME, LATIN], text=text, max_text_tokens=100, num_tokens=18, progress=False
    )
    assert report.scores == score_edits(model, tokenizer, [ROME, LATIN])
    assert report.perplexity == pytest.approx(perplexity(model, tokenizer, text, max_tokens=100))
    assert report.num_records == 2
    assert report.greedy_success is not None
    assert report.fluency is report.consistency is None
    assert report.seconds > 0


def test_without_text_the_perplexity_is_that_of_every_write(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    without = evaluate_edits(model, tokenizer, [ROME], greedy=False, progress=False).perplexity
    config = MemitConfig(layers=[1], covariance_tokens=128, steps=2, num_prefixes=1)
    memory = inject_memory(model, config, tokenizer=tokenizer)
    written = memory.write(ROME.fact, progress=False)
    assert written.perplexity_before == pytest.approx(without)
    after = evaluate_edits(model, tokenizer, [ROME], greedy=False, progress=False).perplexity
    assert written.perplexity == pytest.approx(after)
    assert after != without


def test_decoded_greedily(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def found(_model: Any, _tokenizer: Any, prompts: list[str], targets: list[str], **_: Any) -> list[bool]:
        asked.extend(zip(prompts, targets, strict=True))
        return [prompt in ("Tower near", "Louvre to") for prompt in prompts]

    monkeypatch.setattr("memory_adapters.evaluation.edit_report.greedy_success", found)
    report = evaluate_edits(Bigrams(), words, [LOUVRE, TOWER, MINE], progress=False)
    assert report.greedy_success == pytest.approx(1 / 3)
    assert report.paraphrase_greedy_success == pytest.approx((1 / 4 + 0) / 2)
    assert asked[-3:] == [("Tower near", "New York"), ("Orsay by", "Rome"), ("Orsay in", "Rome")]
    assert evaluate_edits(Bigrams(), words, [MINE], greedy=False, progress=False).greedy_success is None


def test_generated_texts_are_judged(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def say(_model: Any, _tokenizer: Any, prompts: list[str], **_: Any) -> list[str]:
        asked.extend(prompts)
        return [f"{prompt} the city of Rome in Italy" for prompt in prompts]

    monkeypatch.setattr("memory_adapters.evaluation.edit_report.generate_texts", say)
    louvre = EditRecord(ROME.fact, "Paris", ("The Louvre:",), generation_prompts=("Louvre a", "Louvre b"))
    references = {"Rome": ["the city of Rome", "Italy"], "Bern": ["the city of Bern"]}
    model, tokenizer = tiny
    options: dict[str, Any] = dict(greedy=False, generate=True, progress=False)
    report = evaluate_edits(model, tokenizer, [LATIN, louvre], references=references, **options)
    assert asked == ["Ada spoke", "Ada wrote in", "Louvre a", "Louvre b"]
    assert report.num_generated == 4
    assert report.fluency is not None
    assert report.consistency is not None
    assert report.consistency > 50
    without = evaluate_edits(model, tokenizer, [louvre], **options)
    assert without.consistency is None
    with pytest.raises(ValueError, match="`references` has no target of the records"):
        evaluate_edits(model, tokenizer, [LATIN], references=references, **options)
    with pytest.raises(ValueError, match="set `generate=True`"):
        evaluate_edits(model, tokenizer, [ROME, LATIN], references=references)


def test_relations_that_resist_come_first(words: Any) -> None:
    records = [LOUVRE, TOWER, MINE, EditRecord(Fact("Tower to", "Tower", "Rome"), "Paris", relation="way")]
    report = evaluate_edits(Bigrams(), words, records, greedy=False, progress=False)
    assert [(r.relation, r.number, r.exact_match) for r in report.relations] == [
        ("mine", 1, 0),
        ("way", 1, 0),
        ("city", 2, 0.5),
    ]
    assert [r.efficacy for r in report.relations] == [None, 0, 1]
    city = score_edits(Bigrams(), words, [LOUVRE, TOWER])
    assert (report.relations[2].paraphrase, report.relations[2].neighbourhood) == (city.paraphrase, city.neighbourhood)


@pytest.fixture
def report(words: Any) -> EditReport:
    return evaluate_edits(Bigrams(), words, [LOUVRE, TOWER, MINE], text="Louvre in Rome", greedy=False, progress=False)


def test_report_is_saved_and_read_back(report: EditReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.save(path)
    assert EditReport.load(path) == report
    assert json.loads(path.read_text()) == report.to_dict()
    assert report.to_dict()["scores"]["score"] == report.scores.score
    before = path.read_text()
    broken = EditReport(1, report.scores, perplexity=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_report_is_shown(report: EditReport) -> None:
    lines = repr(report).splitlines()
    assert lines[0].startswith("EditReport (3 edits, ")
    cells = {line.split("  ")[1]: line.split() for line in lines[1:] if line}
    assert cells["%"] == ["%", "preferred", "exact", "tokens", "greedy"]
    assert cells["prompt (ES)"][-4:] == ["100.0", "33.3", "50.0", "–"]
    assert cells["neighbours (NS)"][-4:] == ["50.0", "50.0", "50.0", "–"]
    assert cells["mine"] == ["mine", "1", "0.0", "–", "–", "–"]
    assert cells["city"] == ["city", "2", "50.0", "100.0", "75.0", "50.0"]
    assert "fluency (GE)" not in cells
    many = EditReport(20, report.scores, report.relations * 10)
    assert "… 10 more" in repr(many)
    marked = EditReport(1, report.scores, [report.relations[0].__class__("a <b>", 1, 0.0, None, None, None)])
    assert "a &lt;b&gt;" in marked._repr_html_()
    assert marked._repr_html_().count("<table>") == 2


def test_reports_are_compared(report: EditReport) -> None:
    after = EditReport(3, report.scores, fluency=619.94, perplexity=1.1 * (report.perplexity or 0))
    header, rule, first, second = compare({"base | none": report, "edited": after}).splitlines()
    assert [cell.strip() for cell in first.split(" | ")][:2] == [r"| base \| none", "3"]
    assert header.count("|") == rule.count("|") == second.count("|")
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    cells = dict(zip(columns, (cell.strip() for cell in second.strip("|").split("|")), strict=True))
    assert cells["ES"] == "100.0"
    assert cells["PS"] == "75.0"
    assert cells["GE"] == "619.9"
    assert cells["perplexity"].endswith("(+10.00%)")
    assert f"{report.perplexity:.2f} |" in first
    assert "– |" in first
    assert "RS" not in columns
    assert "greedy" not in columns
    with pytest.raises(ValueError, match="`reports` is empty"):
        compare({})


def test_paraphrases_are_shown(words: Any) -> None:
    reports = {"mine": evaluate_edits(Bigrams(), words, [MINE], greedy=False, progress=False)}
    header, line = score_table(reports).splitlines()
    assert header.split() == ["exact", "tokens", "paraphrases", "exact", "paraphrase", "tokens", "perplexity"]
    assert line.split()[:5] == ["mine", "0.0", "0.0", "100.0", "100.0"]
    reports = {"all": evaluate_edits(Bigrams(), words, [LOUVRE, TOWER], greedy=False, progress=False)}
    columns = "S ES PS NS exact tokens paraphrases exact paraphrase tokens portability exact perplexity"
    assert score_table(reports).splitlines()[0].split() == columns.split()


def test_kinds_have_a_line_each(words: Any) -> None:
    asked = (Question("Tower to", "Rome", ("Paris",), "Reasoning"), Question("Tower by", "Rome", (), "Aliasing"))
    record = EditRecord(TOWER.fact, neighbours=(Question("Orsay in", "Paris", (), "Forgetfulness"),), portability=asked)
    report = evaluate_edits(Bigrams(), words, [record, LOUVRE], greedy=False, progress=False)
    lines = kind_table({"without": report, "with": report}).splitlines()
    assert lines[0].split("  ")[-1].strip() == "tokens with"
    assert [line.split()[:2] for line in lines[1:]] == [
        ["neighbours:", "Forgetfulness"], ["portability:", "Reasoning"], ["portability:", "Aliasing"],
    ]  # fmt: skip
    assert lines[2].split()[2:] == ["1", "–", "–", "100.0", "100.0", "100.0", "100.0"]
    shown = {line.split("  ")[1]: line.split() for line in repr(report).splitlines() if line[:2] == "  "}
    assert shown["portability: Reasoning"][-4:] == ["–", "100.0", "100.0", "–"]
    assert EditReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    earlier = {name: value for name, value in report.to_dict().items() if name not in ("kinds", "items")}
    assert EditReport.from_dict(earlier).kinds == []
    assert not kind_table({"a": evaluate_edits(Bigrams(), words, [LOUVRE], greedy=False, progress=False)})


def test_facts_have_a_line_each(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def say(_model: Any, _tokenizer: Any, prompts: list[str], **_: Any) -> list[str]:
        return [f" what follows\n{prompt}\x1b " + "on and " * 20 for prompt in prompts]

    monkeypatch.setattr("memory_adapters.evaluation.edit_report.greedy_texts", say)
    model, tokenizer = tiny
    records = [ROME, EditRecord(Fact(f"{'Then ' * 20}Ada spoke", "Ada", "Latin"))]
    report = evaluate_edits(model, tokenizer, records, greedy=False, per_item=True, progress=False)
    assert [(item.prompt, item.num_paraphrases) for item in report.items] == [
        (ROME.fact.prompt, 1),
        (records[1].fact.prompt, 0),
    ]
    assert report.items[0].says.startswith(" what follows\nThe Louvre is in\x1b on and")
    assert [item.hit for item in report.items] == [score_edits(model, tokenizer, [r]).exact_match == 1 for r in records]
    header, louvre, ada = item_table({"without": report, "with": report}).splitlines()
    assert header.split() == ["prompt", "target", "without", "with", "paraphrases", "hit"]
    assert louvre.split("  ")[1] == "The Louvre is in"
    assert louvre.count("what follows The Louvre is in\ufffd on and o…") == 2
    assert louvre.split()[-4:] == ["miss", "0", "of", "1"]
    assert ada.split()[-2:] == ["miss", "–"]
    assert ada.strip().startswith("…")
    assert EditReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
