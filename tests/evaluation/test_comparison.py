"""Methods compared on the same facts: what is measured, shown and refused."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from memory_adapters import Fact, MemitConfig, MemoryAdapterConfig, MemorySlotsConfig, inject_memory, memories
from memory_adapters.config import MemoryConfig
from memory_adapters.evaluation.comparison.baselines import Baseline, FineTuned, Lora, WrittenMemory
from memory_adapters.evaluation.comparison.compare import NOTHING, Comparison, MethodResult, compare
from memory_adapters.evaluation.comparison.costs import Costs
from memory_adapters.evaluation.comparison.finetuning import Recipe
from memory_adapters.evaluation.edit_report import EditReport
from memory_adapters.evaluation.plots import comparison_plots, score_scatter
from memory_adapters.evaluation.questions import DocumentQuestions, Thing, ThingFact
from memory_adapters.evaluation.records import EditRecord, Question
from memory_adapters.evaluation.scores.choices import Choice, choice_accuracy
from memory_adapters.evaluation.scores.edits import EditScores, score_edits
from memory_adapters.evaluation.scores.own_words import OwnWordsAnswer, OwnWordsScores
from memory_adapters.evaluation.scores.perplexity import perplexity
from tests.evaluation.test_baselines import PROMPT
from tests.support.contract import fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

pytestmark = pytest.mark.integration

RECORDS = [
    EditRecord(
        Fact("The Eiffel Tower is in", "Eiffel Tower", "Rome"),
        "Paris",
        ("To see the Eiffel Tower go to",),
        (("Big Ben is in", "London"),),
    ),
    EditRecord(Fact("{} plays the", "Miles Davis", "piano"), "trumpet"),
]
FOLLOWING = [EditRecord(Fact("{} is in", "Oslo", "Peru"), "Norway", portability=(("Oslo's continent is", "America"),))]
CHOICES = [Choice("Rome is in", ("Italy", "Norway", "Peru", "Chad"), 0), Choice("One and one are", ("two", "six"), 0)]
TEXT = "Rome was not built in a day, nor was Paris, and both were rebuilt more than once."
RECIPE = Recipe(
    learning_rate=1e-2, min_steps=10, num_train_epochs=1, num_prefixes=1, training_args={"disable_tqdm": True}
)
RESULTS = Path(__file__).parents[2] / "docs" / "results"
GUIDE = DocumentQuestions("Rome is a city in Italy. It is old.", (Question("Where is Rome?", "Italy", ("Europe",)),))
ROME = Thing(
    "Rome",
    (ThingFact(Fact("{} is in", "Rome", "Norway"), (Question("Where is Rome?", "Norway"),)),),
    (Question("What is Rome's continent?", "Europe", kind="composed"), Question("What is in Norway?", "Rome")),
)
OSLO = Thing("Oslo", (ThingFact(Fact("{} is in", "Oslo", "Peru"), (Question("Where is Oslo?", "Peru"),)),))
FULL: dict[str, Any] = dict(
    text=TEXT,
    fluency_prompts=2,
    choices=CHOICES,
    portability=FOLLOWING,
    things=[ROME],
    other_things=[OSLO],
    documents=[GUIDE],
    fact_counts=(2, 1),
    progress=False,
)
CHEAP: dict[str, Any] = dict(text=TEXT, greedy=False, costs=False, progress=False)


def edit(**settings: Any) -> MemitConfig:
    return MemitConfig(**{**dict(covariance_tokens=128, steps=4, num_prefixes=1), **settings})


def baselines() -> dict[str, Baseline | MemoryConfig]:
    return {
        "trained": MemoryAdapterConfig(min_steps=10, num_train_epochs=1, num_prefixes=1, learning_rate=1e-2),
        "edit": WrittenMemory(edit(), {"progress": False}),
        "slots": MemorySlotsConfig(lora_rank=2, refine_steps=2),
        "lora": Lora(rank=2, recipe=RECIPE),
        "full": FineTuned(RECIPE),
        "prompt": PROMPT,
    }


@pytest.fixture(scope="module")
def compared() -> tuple[Comparison, PreTrainedModel]:
    model = tiny_model()
    before, state = logits(model), fingerprint(model)
    result = compare(model, byte_tokenizer(), RECORDS, baselines(), **FULL)
    assert torch.equal(logits(model), before)
    assert fingerprint(model) == state
    return result, model


def test_base_and_every_method_are_measured(compared: tuple[Comparison, PreTrainedModel]) -> None:
    result, model = compared
    tokenizer = byte_tokenizer()
    assert result.base.scores == score_edits(model, tokenizer, RECORDS)
    assert result.base.perplexity == pytest.approx(perplexity(model, tokenizer, TEXT))
    assert result.methods[NOTHING].ability == choice_accuracy(model, tokenizer, CHOICES)
    assert list(result.methods) == [NOTHING, *baselines()]
    assert not result.failures()
    for name, found in result.methods.items():
        write, report, costs = found.write, found.report, found.costs
        assert write is not None
        assert report is not None
        assert costs is not None
        assert write.num_items == {"Fact": 2}
        assert (write.num_parameters > 0) == (name != NOTHING)
        assert report.divergence is not None
        assert (report.divergence > 1e-5) == (name in ("edit", "lora", "full", "prompt")), (
            name
        )  # others do not act there
        assert 0 < write.seconds <= costs.seconds or name == NOTHING
        assert report.num_records == report.num_generated == 2
        assert report.fluency is not None
        assert report.greedy_success is not None
        assert found.ability in (0, 1 / 2, 1)
        assert found.portability is not None
        assert found.portability.num_records == 1
        assert found.portability.scores.portability_token_accuracy is not None
        assert costs.prefill is not None
        assert costs.decode is not None
        assert (costs.bytes_on_disk or 0) > 0 or name == NOTHING
        assert (costs.forget_seconds is not None) == (name in ("edit", "slots", "prompt"))
        curve = result.curves[name]
        assert list(curve) == [1, 2]
        if name == "edit":
            assert found.documents is None
            assert found.skipped == "documents: `items` holds a Document; this memory takes Fact."
        else:
            assert found.documents is not None
            assert [answer.wanted for answer in found.documents.answers] == ["Italy"]
        assert found.things is not None
        assert [answer.wanted for answer in found.things.answers] == ["Norway"]
        assert found.things.same is not None
        assert {kind: [a.wanted for a in one.answers] for kind, one in found.consequences.items()} == {
            "composed": ["Europe"],
            "": ["Rome"],
        }
        whole = replace(found, portability=None, things=None, consequences={}, documents=None, skipped=None)
        assert curve[2] == whole, "the full measurement is a point of the curve"
        assert curve[1].report is not None
        assert curve[1].report.num_records == 1
        assert curve[1].report.greedy_success is None
        assert curve[1].report.perplexity is not None


def test_scores_are_those_of_a_memory_written_by_hand(compared: tuple[Comparison, PreTrainedModel]) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    for records, found in ((RECORDS, compared[0].methods["edit"]), (RECORDS[:1], compared[0].curves["edit"][1])):
        memory = inject_memory(model, edit(), tokenizer=tokenizer)
        memory.write([record.fact for record in records], progress=False)  # type: ignore[call-arg]
        assert found.report is not None
        assert found.write is not None
        assert found.report.scores == score_edits(model, tokenizer, records)
        assert found.report.perplexity == pytest.approx(perplexity(model, tokenizer, TEXT), rel=1e-5)
        assert found.report.perplexity != compared[0].base.perplexity
        assert found.write.num_parameters == memory.num_parameters()
        memory.remove()
    memory = inject_memory(model, edit(), tokenizer=tokenizer)
    memory.write([record.fact for record in FOLLOWING], progress=False)  # type: ignore[call-arg]
    written_alone = compared[0].methods["edit"].portability
    assert written_alone is not None
    assert written_alone.scores == score_edits(model, tokenizer, FOLLOWING)


def test_drift(compared: tuple[Comparison, PreTrainedModel]) -> None:
    result = compared[0]
    assert result.drift(result.methods[NOTHING]) == 0
    report = result.methods["full"].report
    assert report is not None
    assert report.perplexity is not None
    assert result.base.perplexity is not None
    expected = (report.perplexity - result.base.perplexity) / result.base.perplexity
    assert result.drift(result.methods["full"]) == pytest.approx(expected)


def test_shown_and_sent(compared: tuple[Comparison, PreTrainedModel]) -> None:
    result = compared[0]
    sent = json.loads(json.dumps(result.to_dict()))
    assert sent == result.to_dict()
    assert Comparison.from_dict(sent) == result
    scores, costs, *curves = result.tables()
    assert scores.title == "2 facts; scores in %"
    wanted = (
        "S,ES,PS,NS,exact,paraphrases exact,greedy,portability exact,portability tokens,"
        "things,things same,consequences: composed,consequences,documents,GE,ability,KL"
    )
    assert scores.rows[0] == ["", *wanted.split(","), "perplexity"]
    assert [row[0] for row in scores.rows[1:]] == [row[0] for row in costs.rows[1:]] == list(result.methods)
    wanted = "write, s|CPU, s|forget, s|on disk|prefill|decode|peak memory|stored numbers"
    assert costs.rows[0] == ["", *wanted.split("|")]
    assert set(costs.rows[1][1:]) == {"–"}
    forgetting = {row[0]: row[3] for row in costs.rows[2:]}
    assert {name for name, cell in forgetting.items() if cell == "= write"} == {"trained", "lora", "full"}
    assert [table.rows[0] for table in curves] == [["", "1", "2"]] * 3
    text = repr(result)
    assert text.startswith("Comparison: 2 facts; scores in %\n")
    for table in (scores, costs, *curves):
        assert table.title in text
        lines = result.markdown().partition(f"## {table.title}\n\n")[2].splitlines()[: len(table.rows) + 1]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert [cells[0], *cells[2:]] == table.rows
    marked = Comparison(2, {**result.methods, "<edit>": result.methods["edit"]})._repr_html_()
    assert "<td>&lt;edit&gt;" in marked
    assert marked.count("<tr>") == 2 * (len(result.methods) + 2)


def test_plots(compared: tuple[Comparison, PreTrainedModel], tmp_path: Path) -> None:
    assert comparison_plots(compared[0], tmp_path) == ["quality_damage.png", "quality_cost.png", "curves.png"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("quality_damage.png", "quality_cost.png"))
    points = {"a": (0.0, 0.5), "b": (0.0, 0.5), "c": (1000.0, 0.9), "d": (-1.0, 0.1)}
    figure = score_scatter(points, across="drift", score="S", linear_below=0.1)
    (axes,) = figure.axes
    assert [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines] == list(points.values())
    assert sorted(text.get_text() for text in axes.texts) == list(points)
    crowd = {f"method {i}": (1.0 + i / 50, 0.5 + i / 200) for i in range(12)} | {"base": (0.0, 0.4)}
    figure = score_scatter(
        crowd, across="drift", score="S", linear_below=0.1, errors=dict.fromkeys(crowd, 0.02), base="base"
    )
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 13
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), "names do not cover each other"
    assert len(figure.axes[0].collections) == 12, "a bar each, and none for the base"
    assert axes.get_xscale() == "symlog"
    assert score_scatter({"a": (2.0, 0.5)}, across="seconds", score="S").axes[0].get_xscale() == "log"
    with pytest.raises(ValueError, match=r"not above 0, of \['a', 'b', 'd'\]"):
        score_scatter(points, across="drift", score="S")
    with pytest.raises(ValueError, match="`points` is empty"):
        score_scatter({}, across="drift", score="S")


def test_without_text_the_perplexity_is_that_of_every_write() -> None:
    measured = WrittenMemory(edit(), {"measure": True})
    result = compare(tiny_model(), byte_tokenizer(), RECORDS[1:], {"edit": measured}, **{**CHEAP, "text": None})
    found = result.methods["edit"]
    assert found.write is not None
    assert found.report is not None
    assert found.write.perplexity_before == pytest.approx(result.base.perplexity)
    assert found.write.perplexity == pytest.approx(found.report.perplexity)
    assert result.tables()[0].rows[0] == ["", "ES", "exact", "perplexity"], "no empty columns"


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was measured")


def test_what_cannot_be_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    monkeypatch.setattr("memory_adapters.evaluation.comparison.tasks.evaluate_edits", refuse)
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        ([], {"edit": edit()}, {}, "`records` is empty"),
        (RECORDS, {"edit": edit(), "deep": edit(layers=[9])}, {}, "`layers` has 9"),
        (RECORDS, {}, {"num_facts": 3}, "`num_facts` has 3: it must be at least 1 and at most 2"),
        (RECORDS, {}, {"fact_counts": (1, 0)}, "`fact_counts` has 0"),
        (RECORDS, {}, {"portability": RECORDS}, "`portability` has no record with questions"),
        (RECORDS, {NOTHING: edit()}, {}, "`baselines` calls a WrittenMemory 'nothing'"),
    ]
    for records, given, settings, why in cases:
        with pytest.raises(ValueError, match=why):
            compare(model, tokenizer, records, given, **settings)
    assert not memories(model)


def test_published_results_load_and_print_the_published_tables() -> None:
    published = Comparison.from_dict(json.loads((RESULTS / "comparison.json").read_text(encoding="utf-8")))
    assert published.markdown() == (RESULTS / "comparison.md").read_text(encoding="utf-8")
    assert published.html() == (RESULTS / "comparison.html").read_text(encoding="utf-8")


def judged(seconds: float = 1.0, **scores: Any) -> MethodResult:
    """Return a result with these scores; what is not given is that of the base model."""
    given = {"own_words": 0.1, "same": 1.0, "perplexity": 20.0, "exact_match": 0.0, "neighbourhood": 0.6, **scores}
    own: dict[str, Any] = {field.name: given.pop(field.name, None) for field in fields(EditScores) if field.init}
    costs = Costs(seconds=seconds, cpu_seconds=seconds, peak_memory=0)
    return MethodResult(report=EditReport(9, EditScores(**own), **given), costs=costs)


@pytest.mark.parametrize(
    ("methods", "advice"),
    [
        ({"a": dict(own_words=0.5), "b": dict(own_words=0.8)}, "Take b: the most .* 80% .* Next: a, 50%"),
        (
            {"a": dict(own_words=0.5), "b": dict(own_words=0.8, same=0.2)},
            "Take a: .* More, at a price: b, 80% .*20% of",
        ),
        (
            {"a": dict(own_words=0.5), "b": dict(own_words=0.8, perplexity=21.0)},
            r"Take a: .*b, 80% .*perplexity \+5.0%",
        ),
        ({"a": dict(own_words=0.5), "b": dict(own_words=0.8, neighbourhood=0.5)}, "Take a: .*neighbours 50% for 60%"),
        (
            {"a": dict(own_words=0.81, seconds=9), "b": dict(own_words=0.8)},
            "Take b: nearly the most .* is written fastest, 80% .* Next: a, 81%",
        ),
        ({"a": dict(own_words=0.81, seconds=9), "b": dict(own_words=0.7)}, "Take a: "),
        ({"a": dict(own_words=0.5, same=0.1)}, "None of the methods leaves the rest as it was. .*: a, 50%"),
        ({"a": dict(own_words=0.1)}, "None of the methods raises questions in other words answered: 10% without"),
        (
            {NOTHING: dict(own_words=None, paraphrase_exact_match=0.0), "a": dict(own_words=None, exact_match=1.0)},
            "None of the methods raises paraphrases answered",
        ),
        (
            {NOTHING: dict(own_words=None), "a": dict(own_words=None, exact_match=1.0)},
            "Take a: the most prompts answered",
        ),
    ],
)
def test_advice(methods: dict[str, dict[str, Any]], advice: str) -> None:
    found = {NOTHING: judged(**methods.pop(NOTHING, {}))}
    found |= {name: judged(**scores) for name, scores in methods.items()}
    comparison = Comparison(9, {**found, "failed": MethodResult(failed="ValueError: no")})
    assert re.match(advice, comparison.advice()), comparison.advice()


def test_advice_names_the_best_of_each_task() -> None:
    base = replace(judged(), things=OwnWordsScores(0.1, 1.0), documents=OwnWordsScores(0.2))
    read = replace(judged(own_words=0.5), things=OwnWordsScores(0.4, 1.0), documents=OwnWordsScores(0.6))
    wild = replace(judged(own_words=0.4), things=OwnWordsScores(0.9, 0.5), documents=OwnWordsScores(0.6))
    said = Comparison(9, {NOTHING: base, "read": read, "wild": wild}).advice()
    assert said.endswith("Of questions about things: read, 40%. Of questions about documents: read and wild, 60%.")
    assert "things" not in Comparison(9, {NOTHING: base, "edit": judged(own_words=0.5)}).advice()
    fast = replace(judged(own_words=0.51, seconds=0.1), things=OwnWordsScores(0.3, 1.0))
    said = Comparison(9, {NOTHING: base, "fast": fast, "read": read}).advice()
    assert said.startswith("Take read: nearly the most questions in other words answered of those")
    assert "and it answers more about things, 50%" in said


def test_own_words_have_a_figure_and_examples(tmp_path: Path) -> None:
    questions = [
        OwnWordsAnswer(f"Question {i}?", f"answer {i}", "It is   hard to\nsay" + "." * 99, False) for i in range(9)
    ]
    named = [replace(question, says=question.wanted, named=True) for question in questions]
    methods = {
        name: replace(result, report=replace(result.report, answers=answers))
        for name, result, answers in ((NOTHING, judged(own_words=0.1, same=None), questions), ("a", judged(), named))
        if result.report is not None
    }
    comparison = Comparison(9, {**methods, "failed": MethodResult(failed="ValueError: no")})
    examples = comparison.examples()
    assert examples is not None
    assert examples.title == "5 of 9 questions in other words, as each answers them"
    assert [row[0] for row in examples.rows] == ["", "(wanted)", NOTHING, "a"]
    assert examples.rows[0][1:] == [f"Question {i}?" for i in (0, 2, 4, 6, 8)]
    assert examples.rows[3][1:] == [f"✓ answer {i}" for i in (0, 2, 4, 6, 8)]
    assert all(len(cell) == 80 and cell.startswith("It is hard to say…"[:-1]) for cell in examples.rows[2][1:])
    assert examples.title in comparison.markdown()
    assert "✓ answer 8" in comparison.html()
    assert "own_words.png" in comparison_plots(comparison, tmp_path)
    assert Comparison(9, {NOTHING: judged()}).examples() is None


def test_what_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [EditRecord(Fact("{} is in", f"City {i}", "Peru")) for i in range(8)]
    options: dict[str, Any] = {**CHEAP, "num_facts": 2, "fact_counts": (1, 4, 8), "max_seconds": 0.0}
    result = compare(tiny_model(), byte_tokenizer(), records, {"edit": edit()}, **options)
    line = result.curves["edit"]
    assert line[1].report is not None, "there is nothing to go by for the smallest number"
    assert re.fullmatch(r"2 facts took \d+ s; so many would take about \d+ s", line[4].skipped or "")
    assert line[8].skipped is not None
    assert line[8].report is None
    assert not result.failures()
    cells = {row[0]: row[1:] for row in result.tables()[2].rows}
    assert cells["edit"][1:] == ["skipped", "skipped"]
    assert re.search(r"skipped: edit with 4(, 8)? facts: 2 facts took", repr(result))
    assert Comparison.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_of_contradicting_records_the_first_counts() -> None:
    other = replace(RECORDS[0], fact=replace(RECORDS[0].fact, target="Oslo"))
    memory = {"slots": MemorySlotsConfig()}
    with pytest.warns(UserWarning, match="1 of 4 records contradict earlier ones"):
        result = compare(
            tiny_model(),
            byte_tokenizer(),
            [RECORDS[0], other, RECORDS[0], RECORDS[1]],
            memory,
            **CHEAP,
            num_facts=2,
            fact_counts=[2, 4],
        )
    assert not result.failures()
    assert result.num_facts == 1
    line = result.curves["slots"]
    assert list(line) == [1, 3]
    write = line[3].write
    assert write is not None
    assert write.num_items == {"Fact": 2}


def test_a_page_escapes_names_and_advice(compared: tuple[Comparison, PreTrainedModel]) -> None:
    edit = compared[0].methods["edit"]
    page = Comparison(2, {**compared[0].methods, "<edit>": edit, "<b>": MethodResult(failed="<i>")}).html()
    assert "<td>&lt;edit&gt;" in page
    assert "&lt;i&gt;" in page
    assert "<i>" not in page
    assert page.count("<table>") == 2
