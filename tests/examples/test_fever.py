"""The FEVER experiment: what counts as an answer, its scores, every baseline, resumption, and its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import PreTrainedModel

from examples.fever import (
    FeverData,
    Page,
    Run,
    Setup,
    judge,
    measure,
    run_fever,
    separation,
    standard_baselines,
)
from examples.fever.data import LABELS, Claim
from examples.fever.experiment import FeverResults
from memory_adapters import memories
from memory_adapters.evaluation.plots import error_bars
from tests.support.contract import fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

pytestmark = pytest.mark.integration

YES, NO, UNKNOWN = LABELS


def data(seed: int = 0) -> FeverData:
    def page(title: str) -> Page:
        training = (Claim(f"{title} is in Italy.", YES), Claim(f"{title} is small.", NO))
        return Page(title, f"{title} is a city.", training, (Claim(f"{title} is old.", YES), Claim("x", NO)))

    return FeverData((page("Rome"), page("Oslo")), (Claim(f"Who knows {seed}.", UNKNOWN),), 9, 3, 2)


def model() -> PreTrainedModel:
    found = tiny_model()
    found.config.max_position_embeddings = 2048
    return found


def forced(monkeypatch: pytest.MonkeyPatch, said: list[str], letters: list[str]) -> None:
    """Let greedy decoding say `said`, and the answers' letters be likeliest as in `letters`."""
    tokenizer = byte_tokenizer()
    letter_ids = {c: tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "abc"}

    def decode(_model: Any, _tokenizer: Any, rows: list[list[int]], length: int) -> Any:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in said]
        steps = []
        for letter in letters:
            one = torch.zeros(length, 260)
            one[:, letter_ids[letter]] = 1.0
            steps.append(one)
        return ids, steps

    monkeypatch.setattr("examples.fever.scoring._decode", decode)


def test_what_is_none_of_the_answers_is_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, [" (a)", " (d)", " yes"], ["a", "c", "b"])
    found = judge(model(), byte_tokenizer(), ["A:", "A:", "A:"])
    assert [one.generated for one in found] == [YES, None, None]
    assert [one.likeliest for one in found[:2]] == [YES, UNKNOWN]


def test_answers_are_those_of_whole_forward_passes() -> None:
    m, tokenizer = model(), byte_tokenizer()
    with torch.no_grad():
        m.get_output_embeddings().weight[:] = torch.randn(260, 32, generator=torch.Generator().manual_seed(1)) * 0.3
    prompts = [f"Claim: {text}\nA:" for text in ("Rome is old.", "Rome", "It rains in Oslo and in Bergen.", "x")]
    ids = {c: tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "abc"}
    for found, prompt in zip(judge(m, tokenizer, prompts, batch_tokens=80), prompts, strict=True):
        with torch.no_grad():
            row = tokenizer(prompt + " (", return_tensors="pt")["input_ids"]
            row = row[:, : -1 if row[0, -1] == tokenizer.eos_token_id else None]
            last = m(input_ids=row).logits[0, -1]
        best = max("abc", key=lambda c: last[ids[c]].item())
        assert found.likeliest == LABELS["abc".index(best)]
        assert found.generated is None
        assert found.log_odds == pytest.approx(float(last[ids["a"]] - last[ids["b"]]), abs=1e-4)


def test_scores_are_scikit_learns_and_those_by_hand() -> None:
    truth = [YES, YES, YES, NO, NO]
    answers = [YES, NO, None, NO, UNKNOWN]
    found = measure(truth, answers)
    # by hand: YES 1 right, 0 wrong, 2 missed: F1 2/4; NO 1 right, 1 wrong, 1 missed: F1 2/4; together 4/8... of counts
    assert found.accuracy == pytest.approx(2 / 5)
    assert found.f1_macro == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert found.f1_micro == pytest.approx(2 * 2 / (2 * 2 + 1 + 3))
    assert found.answered == pytest.approx(4 / 5)
    whole = [YES, NO, UNKNOWN, NO, YES, UNKNOWN]
    said = [YES, NO, NO, NO, UNKNOWN, UNKNOWN]
    scores = measure(whole, said)
    assert scores.accuracy == accuracy_score(whole, said)
    assert scores.f1_micro == pytest.approx(f1_score(whole, said, average="micro"))
    assert scores.f1_macro == pytest.approx(f1_score(whole, said, average="macro"))
    for wrong in ([], [YES]):
        with pytest.raises(ValueError, match="`answers` has"):
            measure(wrong, [])


def test_separation_is_the_share_of_pairs_in_order() -> None:
    truth, odds = [YES, NO, YES, NO, UNKNOWN], [1.0, 0.5, 0.2, -3.0, 9.0]
    pairs = [(a > b) for a in (1.0, 0.2) for b in (0.5, -3.0)]
    assert separation(truth, odds) == pytest.approx(sum(pairs) / len(pairs))
    assert separation(truth, [x + 5 for x in odds]) == separation(truth, odds), "no matter which answer is preferred"
    assert separation([YES, YES], [1.0, 2.0]) is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeverResults, Path]:
    folder = tmp_path_factory.mktemp("fever")
    m = model()
    before, state = logits(m), fingerprint(m)
    found = run_fever(
        m,
        byte_tokenizer(),
        data,
        standard_baselines(epochs=1),
        folder,
        shots=(0, 1),
        seeds=(0,),
        about={"model": "tiny"},
        progress=False,
    )
    assert torch.equal(logits(m), before)
    assert fingerprint(m) == state
    return found, folder


def test_every_baseline_judges_every_claim(finished: tuple[FeverResults, Path]) -> None:
    results, _ = finished
    assert len(results.baselines) == 16
    for run in results.runs:
        assert sorted(run.truth) == [0, 0, 1, 1]
        for answers in (run.generated, run.likeliest, run.log_odds):
            assert set(answers) == {"0", "1"}
            assert all(len(labels) == 4 for labels in answers.values())
    stored = {run.baseline: run.num_parameters for run in results.runs}
    assert stored["Pretrained"] == stored["page in the prompt"] == 0
    assert stored["Doc and Temp, two memories"] > stored["Doc"] > 0
    assert stored["Temp, all weights"] == sum(p.numel() for p in model().parameters())


def test_baselines_differ_where_they_should(finished: tuple[FeverResults, Path]) -> None:
    m, tokenizer = model(), byte_tokenizer()
    baselines = standard_baselines(epochs=3)  # the first step of one alone has no learning rate yet
    setup = Setup(m, tokenizer, data(), 0, 1, finished[1], ["Some other text here."] * 8)
    before = logits(m)
    for name, baseline in baselines.items():
        with baseline.applied(setup) as reading:
            changed = not torch.equal(logits(m), before)
            if reading.page is not None:
                with reading.page(setup.data.pages[0]):
                    first = logits(m)
                with reading.page(setup.data.pages[1]):
                    assert not torch.equal(logits(m), first), "each page has slots of its own"
            assert bool(reading.context(setup.data.pages[0])) == (name == "page in the prompt")
            assert len(memories(m)) == {"Doc and Temp, two memories": 2}.get(
                name.removesuffix(", router"), len(memories(m))
            )
        assert torch.equal(logits(m), before)
        if name in ("Doc", "Temp", "Doc, LoRA", "Temp, all weights", "facts edited (MEMIT)"):
            assert changed, name


def test_a_second_call_runs_nothing_again(finished: tuple[FeverResults, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    results, folder = finished
    m = model()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was run again")

    monkeypatch.setattr("examples.fever.experiment.judge", refuse)
    settings: dict[str, Any] = dict(shots=(0, 1), seeds=(0,), about={"model": "tiny"}, progress=False)
    baselines = standard_baselines(epochs=1)
    again = run_fever(m, byte_tokenizer(), data, baselines, folder, **settings)
    assert again == results
    fewer = run_fever(m, byte_tokenizer(), data, baselines, folder, **{**settings, "shots": (0,)})
    assert fewer.runs == results.runs
    with pytest.raises(AssertionError, match="run again"):
        run_fever(m, byte_tokenizer(), data, baselines, folder, **{**settings, "shots": (0, 2)})
    with pytest.raises(ValueError, match="other model: give another folder"):
        run_fever(m, byte_tokenizer(), data, baselines, folder, **{**settings, "about": {"model": "big"}})
    (folder / "runs" / "Temp-seed0.json").unlink()
    with pytest.raises(AssertionError, match="run again"):
        run_fever(m, byte_tokenizer(), data, baselines, folder, **settings)
    for name in ("baselines", "shots", "seeds"):
        given: dict[str, Any] = {"baselines": baselines, **settings, name: {}}
        with pytest.raises(ValueError, match=f"`{name}` is empty"):
            run_fever(m, byte_tokenizer(), data, given.pop("baselines"), folder, **given)


def test_an_interrupted_run_leaves_the_model_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    state = fingerprint(m)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.fever.experiment.judge", interrupt)
    for name, baseline in standard_baselines(epochs=1).items():
        with pytest.raises(KeyboardInterrupt):
            run_fever(m, byte_tokenizer(), data, {name: baseline}, tmp_path, shots=(0,), seeds=(0,), progress=False)
        assert fingerprint(m) == state, name
    assert not list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else True


def test_tables_and_chart(tmp_path: Path) -> None:
    def run(name: str, seed: int, right: int) -> Run:
        truth = [0, 0, 1, 1]
        answers = truth[:right] + [-1] * (4 - right)
        return Run(name, seed, truth, {"1": answers}, {"1": truth}, {"1": [2.0, 0.0, 1.0, -1.0]}, 10, 1.0, 2.0)

    runs = [run("Doc", 0, 4), run("Doc", 1, 2), run("Temp", 0, 1), run("Temp", 1, 1)]
    about = {"seeds": [0, 1], "N_full": 9, "N_top": 3, "N_trunc": 2, "labels": {YES: 2, NO: 2}}
    results = FeverResults(about, runs)
    assert results.table("accuracy", "generated").splitlines() == [
        "|      |        1-shot |",
        "|:-----|--------------:|",
        "| Doc  | 0.750 ± 0.354 |",
        "| Temp | 0.250 ± 0.000 |",
    ]
    more = FeverResults(about, [*runs, replace(runs[0], baseline="asked less", generated={"0": [0] * 4})])
    assert more.table("accuracy", "generated").splitlines()[2:] == [
        "| Doc        |        – | 0.750 ± 0.354 |",
        "| Temp       |        – | 0.250 ± 0.000 |",
        "| asked less |    0.500 |             – |",
    ]
    assert results.majority == 0.5
    text = results.markdown()
    assert "N_full=9, N_top=3, N_trunc=2" in text
    assert text.count("### ") == 9
    assert json.loads(json.dumps(results.to_dict()))["runs"][0]["baseline"] == "Doc"
    accuracies = results.values_by_baseline(1, "generated", "accuracy")
    assert accuracies == {"Doc": [1.0, 0.5], "Temp": [0.25, 0.25]}
    assert results.values("Doc", 1, "odds", "auc") == [0.75, 0.75], "3 of the 4 pairs are in order"
    figure = error_bars({"generated": accuracies}, "accuracy", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [0.75, 0.25]
    with pytest.raises(ValueError, match="`panels` is empty"):
        error_bars({}, "accuracy")
