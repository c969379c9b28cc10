"""Run every baseline with every number of shots and seed, resumably, and show the results as tables."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.fever.baselines import FeverBaseline, Setup
from examples.fever.data import LABELS, FeverData, Page
from examples.fever.prompts import choose_shots, few_shot_prompt
from examples.fever.scoring import Judgement, Metrics, judge, measure, separation
from memory_adapters.base_model.sampling import sample_text
from memory_adapters.evaluation.tables import format_table
from memory_adapters.files.atomic import atomic_file

__all__ = ["FeverResults", "Run", "run_fever"]

SCORINGS = ("generated", "likeliest")
METRICS = ("accuracy", "f1_micro", "f1_macro")


@dataclass(frozen=True)
class Run:
    """Hold the answers of one baseline with one seed.

    Attributes:
        baseline: Its name.
        seed: The seed.
        truth: The claims' labels, as indices of `LABELS`.
        generated: For each number of shots, the labels generated; −1 where the text begins with none.
        likeliest: For each number of shots, the likeliest labels.
        log_odds: For each number of shots, the log-odds of (a) against (b).
        num_parameters: How many numbers the baseline stores.
        preparing: Seconds until it was on the model, with those of memories trained for another baseline.
        judging: Seconds of all judgements.
    """

    baseline: str
    seed: int
    truth: list[int]
    generated: dict[str, list[int]]
    likeliest: dict[str, list[int]]
    log_odds: dict[str, list[float]]
    num_parameters: int
    preparing: float
    judging: float

    def auc(self, shots: int) -> float | None:
        """How well the odds of (a) tell supported from refuted claims with so many shots; see `separation`."""
        return separation([LABELS[i] for i in self.truth], self.log_odds[str(shots)])

    def metrics(self, shots: int, scoring: str) -> Metrics:
        """Scores with so many shots, by `"generated"` or `"likeliest"` answers."""
        answers = {"generated": self.generated, "likeliest": self.likeliest}[scoring][str(shots)]
        return measure([LABELS[i] for i in self.truth], [None if i < 0 else LABELS[i] for i in answers])


@dataclass(frozen=True)
class FeverResults:
    """Hold what `run_fever` found.

    Attributes:
        about: Counts and settings.
        runs: Every baseline with every seed.
    """

    about: dict[str, Any]
    runs: list[Run]

    @property
    def baselines(self) -> list[str]:
        """Names of the baselines."""
        return list(dict.fromkeys(run.baseline for run in self.runs))

    @property
    def shots(self) -> list[int]:
        """All numbers of shots that a baseline was asked with."""
        return sorted({int(k) for run in self.runs for k in run.generated})

    def values(self, baseline: str, shots: int, scoring: str, metric: str) -> list[float]:
        """Return the metric with each seed; empty if the baseline was not asked with so many shots.

        `metric` is a field of `Metrics`, or `"auc"` with the scoring `"odds"`.
        """
        own = [run for run in self.runs if run.baseline == baseline and str(shots) in run.generated]
        if metric == "auc":
            return [auc for auc in (run.auc(shots) for run in own) if auc is not None]
        return [run.metrics(shots, scoring).to_dict()[metric] for run in own]

    def values_by_baseline(self, shots: int, scoring: str, metric: str) -> dict[str, list[float]]:
        """Return `values` of all baselines that were asked with so many shots, for `plots.error_bars`."""
        found = {name: self.values(name, shots, scoring, metric) for name in self.baselines}
        return {name: values for name, values in found.items() if values}

    @property
    def majority(self) -> float:
        """Accuracy of the most frequent label alone, mean over seeds."""
        truths = {run.seed: run.truth for run in self.runs}.values()
        return statistics.fmean(max(map(truth.count, truth)) / len(truth) for truth in truths)

    def table(self, metric: str, scoring: str) -> str:
        """Return Markdown: a row a baseline, a column a number of shots; mean ± standard deviation over seeds."""
        rows = [["", *(f"{k}-shot" for k in self.shots)]]
        for name in self.baselines:
            rows.append([name, *(_mean_and_deviation(self.values(name, k, scoring, metric)) for k in self.shots)])
        return format_table(rows, "pipe")

    def markdown(self) -> str:
        """Return all tables."""
        counts = ", ".join(f"{name}={self.about[name]}" for name in ("N_full", "N_top", "N_trunc"))
        labels = ", ".join(f"{number} {label}" for label, number in self.about["labels"].items())
        about = [f"* {name}: {value}" for name, value in self.about.items() if name in _DESCRIBED]
        about = [
            f"* pages: {counts}; claims judged with seed {self.runs[0].seed}: {labels}",
            f"* accuracy of the most frequent label alone: {self.majority:.3f}",
            *about,
        ]
        parts = ["\n".join(about)]
        for scoring, what in zip(SCORINGS, ("what the model generates", "the likeliest answer"), strict=True):
            for metric in METRICS:
                parts.append(f"### {metric.replace('_', ' ')}, {what}\n\n{self.table(metric, scoring)}")
        auc = "area under the ROC curve, supported against refuted claims by the odds of (a) against (b)"
        parts.append(f"### {auc}\n\n{self.table('auc', 'odds')}")
        answered = [["", "answered"], *([name, _mean_and_deviation(self._answered(name))] for name in self.baselines)]
        title = "share of generated answers that are one of the labels, all shots"
        parts.append(f"### {title}\n\n{format_table(answered, 'pipe')}")
        costs = [["", "stored numbers", "seconds to prepare", "seconds to judge"]]
        for name in self.baselines:
            own = [run for run in self.runs if run.baseline == name]
            seconds = [statistics.fmean(getattr(run, part) for run in own) for part in ("preparing", "judging")]
            costs.append([name, f"{own[0].num_parameters:,}", *(f"{mean:.0f}" for mean in seconds)])
        parts.append(f"### costs\n\n{format_table(costs, 'pipe')}")
        return "\n\n".join(parts) + "\n"

    def _answered(self, baseline: str) -> list[float]:
        by_shots = [self.values(baseline, k, "generated", "answered") for k in self.shots]
        return [statistics.fmean(values) for values in zip(*filter(None, by_shots), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"about": self.about, "runs": [vars(run) for run in self.runs]}


_DESCRIBED = ("model", "command", "versions", "data", "seeds", "training_shots")


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def run_fever(
    model: Any,
    tokenizer: Any,
    data_of_seed: Callable[[int], FeverData],
    baselines: Mapping[str, FeverBaseline],
    folder: str | os.PathLike[str],
    *,
    shots: Sequence[int] = (0, 1, 2, 3, 4, 5),
    seeds: Sequence[int] = (0, 1, 2),
    training_shots: int = 1,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> FeverResults:
    """Judge the claims with every baseline, number of shots and seed.

    What is finished is stored in `folder`, a file for each baseline and seed, and is not run again: after an
    interruption give the same arguments. A baseline that was asked with fewer shots is run anew. The model is left as
    it was.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        data_of_seed: Pages and claims, split by this seed; the pages must not depend on it.
        baselines: Name to baseline.
        folder: For results, and memories that several baselines use.
        shots: Numbers of solved claims before each claim.
        seeds: Of the split, the shots and the training.
        training_shots: Solved claims before each training claim in the few-shot form.
        about: What else should be known of the run: model, command, versions.
        progress: Show bars.

    Raises:
        ValueError: If there is no baseline, number of shots or seed, or `folder` holds results with other settings.
    """
    for name, given in (("baselines", baselines), ("shots", shots), ("seeds", seeds)):
        if not given:
            raise ValueError(f"`{name}` is empty: give at least one.")
    target = Path(folder)
    data = {seed: data_of_seed(seed) for seed in seeds}
    first = data[seeds[0]]
    counted = {"N_full": first.n_full, "N_top": first.n_top, "N_trunc": first.n_trunc, "labels": first.label_counts}
    settings = {**counted, "training_shots": training_shots, **(about or {})}
    _check_settings(target, settings)
    wanted = {str(k) for k in shots}
    unrelated: list[str] = []
    runs = []
    for name, baseline in baselines.items():
        for seed in seeds:
            file = target / "runs" / f"{''.join(c if c.isalnum() else '-' for c in name)}-seed{seed}.json"
            known = Run(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
            if known is not None and wanted <= set(known.generated):
                runs.append(known)
                continue
            unrelated = unrelated or sample_text(model, tokenizer, [""] * 24, num_tokens=64, seed=0)
            setup = Setup(model, tokenizer, data[seed], seed, training_shots, target, unrelated)
            runs.append(_run(name, baseline, setup, shots, progress))
            _save(file, vars(runs[-1]))
    return FeverResults({**settings, "seeds": list(seeds)}, runs)


def _run(name: str, baseline: FeverBaseline, setup: Setup, shots: Sequence[int], progress: bool) -> Run:
    start = time.perf_counter()
    asked = [(page, claim) for page in setup.data.pages for claim in page.validation]
    found: dict[int, list[Judgement]] = {}
    with baseline.applied(setup) as reading:
        ready = time.perf_counter()
        groups: list[tuple[Page | None, list[Any]]] = [(None, asked)]
        if reading.page is not None:
            groups = [(page, [one for one in asked if one[0] == page]) for page in setup.data.pages]
        for page, own in groups:
            with nullcontext() if page is None or reading.page is None else reading.page(page):
                for k in shots:
                    prompts = [
                        few_shot_prompt(claim, choose_shots(setup.data, of, claim, k, setup.seed), reading.context(of))
                        for of, claim in own
                    ]
                    found.setdefault(k, []).extend(judge(setup.model, setup.tokenizer, prompts, progress=progress))
        end = time.perf_counter()
    label: dict[str | None, int] = {None: -1}
    label.update({name: i for i, name in enumerate(LABELS)})
    return Run(
        baseline=name,
        seed=setup.seed,
        truth=[label[claim.label] for _, claim in asked],
        generated={str(k): [label[one.generated] for one in answers] for k, answers in found.items()},
        likeliest={str(k): [label[one.likeliest] for one in answers] for k, answers in found.items()},
        log_odds={str(k): [round(one.log_odds, 4) for one in answers] for k, answers in found.items()},
        num_parameters=reading.num_parameters,
        preparing=ready - start + reading.saved_seconds,
        judging=end - ready,
    )


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Results of other settings must not be mixed with these."""
    file = folder / "settings.json"
    text = json.dumps(settings, indent=1)
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = sorted(name for name in {*before, *settings} if before.get(name) != json.loads(text).get(name))
        if changed:
            raise ValueError(f"`{folder}` holds results with other {', '.join(changed)}: give another folder.")
    else:
        _save(file, settings)


def _save(file: Path, values: Mapping[str, Any]) -> None:
    with atomic_file(file) as staging:
        staging.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
