"""Draw figures: where a model recalls facts, how methods score, at what cost.

They need matplotlib, whose global state is not touched.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from memory_adapters.evaluation.comparison.results import NOTHING, Comparison, MethodResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Trace", "comparison_plots", "error_bars", "score_bars", "score_curves", "score_scatter", "trace_heatmap"]

Path = str | os.PathLike[str]
_DRIFT, _SECONDS = "perplexity drift, %", "seconds to write"
_OWN_WORDS, _CHANGED = "questions in other words answered", "answers about other things that changed, %"
_LINEAR_DRIFT = 0.1  # percent: below it the axis of the drift is linear
_LETTER_WIDTH, _LABEL_HEIGHT = 4.6, 9  # of a method's name, in points
_LEGEND_LINES = 14  # of a figure's height
_PANELS = {"hidden": "Block outputs", "mlp": "MLP outputs", "attention": "Attention outputs"}


class Trace(Protocol):
    """Give what `trace_heatmap` draws, as the table that `memit.tracing.trace_facts` returns does.

    Attributes:
        effects: For each kind of state, the effects (roles, num_layers); NaN where a role never occurred.
        roles: Names of the rows.
        window: Blocks restored together at each layer, of MLP and attention.
    """

    @property
    def effects(self) -> Mapping[str, Tensor]: ...

    @property
    def roles(self) -> Sequence[str]: ...

    @property
    def window(self) -> int: ...


def trace_heatmap(table: Trace, path: Path | None = None) -> Figure:
    """Draw average indirect effects by token role (rows) and layer (columns), a panel for each kind, one colour scale.

    Args:
        table: The effects.
        path: Where to write the figure; its ending (.png, .svg, .pdf) names the format. None to write nothing.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    kinds = list(table.effects)
    layers = table.effects[kinds[0]].shape[1]
    figure = _figure(1.8 + max(3.0, 0.16 * layers) * len(kinds), 2.8)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    most = max(float(effects.nan_to_num().abs().max()) for effects in table.effects.values()) or 1.0
    for panel, kind in zip(panels, kinds, strict=True):
        image = panel.imshow(table.effects[kind].numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        panel.set_facecolor("0.85")  # shows where a role never occurred
        panel.set_title(_PANELS[kind] + ("" if kind == "hidden" else f", window of {table.window}"), fontsize=10)
        panel.set_xlabel("layer" if kind == "hidden" else "middle layer")
        panel.locator_params(axis="x", integer=True)
    panels[0].set_yticks(range(len(table.roles)), labels=table.roles)
    figure.colorbar(image, ax=panels, label="average indirect effect")
    return _saved(figure, path)


def score_bars(
    reports: Mapping[str, Mapping[str, float | None]], metrics: Sequence[str], path: Path | None = None
) -> Figure:
    """Draw scores of methods side by side: a group of bars a metric, a colour a method; what is None has no bar.

    Args:
        reports: Name of a method to its scores.
        metrics: Which scores, from left to right.
        path: As in `trace_heatmap`.

    Raises:
        ValueError: If `metrics` is empty, or no report has a value of one of them.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    _check(metrics, lambda metric: any(scores.get(metric) is not None for scores in reports.values()))
    figure = _figure(max(4.0, 1.0 + 0.5 * len(metrics) * (len(reports) + 1)), 3.2)
    axes = figure.subplots()
    width = 0.8 / len(reports)
    for i, (name, scores) in enumerate(reports.items()):
        bars = [(at - 0.4 + (i + 0.5) * width, scores.get(metric)) for at, metric in enumerate(metrics)]
        known = [(at, value) for at, value in bars if value is not None]
        drawn = axes.bar([at for at, _ in known], [value for _, value in known], width, color=f"C{i}", label=name)
        axes.bar_label(drawn, fmt="{:.3g}", fontsize=7)
    axes.set_xticks(range(len(metrics)), labels=[_label(metric) for metric in metrics])
    axes.set_xlim(-0.5, len(metrics) - 0.5)
    _tidy(figure, axes)
    return _saved(figure, path)


def score_curves(
    points: Mapping[str, Sequence[tuple[float, Mapping[str, float | None]]]],
    metrics: Sequence[str],
    path: Path | None = None,
    *,
    across: str = "edits",
) -> Figure:
    """Draw metrics over the number of edits, on a logarithmic axis: a panel a metric, a line a method.

    Args:
        points: Name of a method to (number above 0, its scores then), in any order; what is None has no point.
        metrics: Which scores, from left to right.
        path: As in `trace_heatmap`.
        across: Label of the numbers.

    Raises:
        ValueError: If `metrics` is empty, or no point has a value of one of them.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    scored = [scores for line in points.values() for _, scores in line]
    _check(metrics, lambda metric: any(scores.get(metric) is not None for scores in scored))
    figure = _figure(1.5 * _legend_columns(len(points)) + 3.0 * len(metrics), 3.2)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        for i, (name, line) in enumerate(points.items()):
            known = sorted((x, scores[metric]) for x, scores in line if scores.get(metric) is not None)
            marks = "o-" if i < 10 else "s--"  # there are ten colours
            panel.plot([x for x, _ in known], [y for _, y in known], marks, ms=4, color=f"C{i}", label=name)
        panel.set_xscale("log")
        places = sorted({x for line in points.values() for x, _ in line})
        panel.set_xticks(places, labels=[f"{x:g}" for x in places])
        panel.minorticks_off()
        panel.set_xlabel(across)
        panel.set_title(_label(metric), fontsize=10)
        panel.grid(alpha=0.3)
    _tidy(figure, panels[0])
    return _saved(figure, path)


def score_scatter(
    points: Mapping[str, tuple[float, float]],
    path: Path | None = None,
    *,
    across: str,
    score: str,
    linear_below: float | None = None,
    errors: Mapping[str, float] | None = None,
    base: str | None = None,
) -> Figure:
    """Draw a labelled point a method: its score over what it costs or damages, on a logarithmic axis.

    Args:
        points: Name of a method to (cost or damage, score).
        path: As in `trace_heatmap`.
        across: Label of the cost or damage.
        score: Label of the score.
        linear_below: The axis is linear between this and its negative, so that it has room for 0 and below; None where
            all numbers are above 0.
        errors: Name of a method to the standard error of its score, drawn as a bar.
        base: The method that is the model alone: a cross, and a line across at its score.

    Raises:
        ValueError: If there is no point, or one without place on the axis.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not points:
        raise ValueError("`points` is empty: give at least one method.")
    if linear_below is None and (low := [name for name, (x, _) in points.items() if not x > 0]):
        raise ValueError(f"`points` has numbers not above 0, of {low}: set `linear_below`.")
    figure = _figure(7.2, 4.8)
    axes = figure.subplots()
    for i, (name, (x, y)) in enumerate(points.items()):
        if name == base:
            axes.plot(x, y, "x", color="0.3", ms=8)
            axes.axhline(y, color="0.6", lw=0.8, ls="--", zorder=0)
        else:
            axes.errorbar(x, y, (errors or {}).get(name), fmt="o", ms=5, color=f"C{i}", capsize=2, lw=0.8)
    if linear_below is None:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=linear_below)
    axes.margins(0.15)
    axes.set_xlabel(across)
    axes.set_ylabel(score)
    axes.grid(alpha=0.3)
    _label_points(figure, axes, points, errors or {}, base)
    return _saved(figure, path)


def _label_points(
    figure: Figure,
    axes: Any,
    points: Mapping[str, tuple[float, float]],
    errors: Mapping[str, float],
    base: str | None,
) -> None:
    """Write each name near its point where it covers no other name, point or bar, with a line to it if it is far."""
    figure.draw_without_rendering()  # places are known from here on
    scale = 72 / figure.dpi
    places = {name: axes.transData.transform(point) * scale for name, point in points.items()}
    frame = axes.get_window_extent()
    left, bottom, right, top = (side * scale for side in frame.extents)
    taken = []
    for name, (x, y) in points.items():
        low, high = (axes.transData.transform((x, y + sign * errors.get(name, 0.0))) * scale for sign in (-1, 1))
        taken.append((low[0] - 4, low[1] - 4, high[0] + 4, high[1] + 4))
    for name in sorted(points, key=lambda name: -places[name][1]):
        x, y = places[name]
        width, height = _LETTER_WIDTH * len(name), _LABEL_HEIGHT

        def free(
            dx: float, dy: float, x: float = x, y: float = y, width: float = width, height: float = height
        ) -> bool:
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            inside = left <= box[0] and box[2] <= right and bottom <= box[1] and box[3] <= top
            return inside and not any(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
            )

        offsets = [
            (side, lift - height / 2)
            for distance in range(40)
            for lift in (distance * 4, -distance * 4)
            for side in (7 + 2 * distance, -7 - 2 * distance - width)
        ]
        dx, dy = next((offset for offset in offsets if free(*offset)), offsets[0])
        taken.append((x + dx, y + dy, x + dx + width, y + dy + height))
        color = "0.3" if name == base else f"C{list(points).index(name)}"
        far = abs(dy + height / 2) > height / 2
        line = {"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkB": 3, "relpos": (0 if dx > 0 else 1, 0.5)}
        axes.annotate(
            name, points[name], (dx, dy), textcoords="offset points", color=color, fontsize=8,
            annotation_clip=False, arrowprops=line if far else None,
        )  # fmt: skip


def comparison_plots(comparison: Comparison, folder: Path) -> list[str]:
    """Draw a comparison: quality_damage.png, quality_cost.png, own_words.png and, if it has curves, curves.png.

    Quality is S, or exact match where nothing is known to judge S by, with its standard error. Damage is the
    perplexity's drift, cost the seconds to write. own_words.png has the share of questions in other words that are
    answered, over the share of chat answers about other things that changed. What has no value of them is left out,
    and a figure without a point is not drawn.

    Args:
        comparison: What `compare` found.
        folder: Where to write the files.

    Returns:
        Names of the files.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    quality, field = ("exact match", "exact_match") if comparison.base.scores.score is None else ("S", "score")

    def values(result: MethodResult) -> dict[str, float | None]:
        report, drift = result.report, comparison.drift(result)
        stored = result.write.num_parameters if result.write else 0  # by nothing: none, in no time
        same = None if report is None else report.same
        return {
            quality: None if report is None else getattr(report.scores, field),
            _DRIFT: None if drift is None or not math.isfinite(drift) else 100 * drift,
            _SECONDS: result.costs.seconds if result.costs and stored else None,
            _OWN_WORDS: None if report is None else report.own_words,
            _CHANGED: None if same is None else 100 * (1 - same),
        }

    found = {name: values(result) for name, result in comparison.methods.items()}
    found[NOTHING][_CHANGED] = 0.0
    drawn = []
    for file, across, score, linear in (
        ("quality_damage.png", _DRIFT, quality, _LINEAR_DRIFT),
        ("quality_cost.png", _SECONDS, quality, None),
        ("own_words.png", _CHANGED, _OWN_WORDS, 1.0),
    ):
        pairs = {name: (one[across], one[score]) for name, one in found.items()}
        points = {name: (x, y) for name, (x, y) in pairs.items() if x is not None and y is not None}
        if points and set(points) != {NOTHING}:
            score_scatter(
                points,
                os.path.join(folder, file),
                across=across,
                score=score,
                linear_below=linear,
                errors={name: _standard_error(comparison.methods[name], score) for name in points},
                base=NOTHING,
            )
            drawn.append(file)
    lines = {
        name: [(float(number), values(result)) for number, result in line.items()]
        for name, line in comparison.curves.items()
    }
    scored = [scores for line in lines.values() for _, scores in line]
    shown = [label for label in (quality, _DRIFT, _SECONDS) if any(scores[label] is not None for scores in scored)]
    if shown:
        figure = score_curves(lines, shown, across="facts")
        for panel, label in zip(figure.axes, shown, strict=True):
            if label == _DRIFT:
                panel.set_yscale("symlog", linthresh=_LINEAR_DRIFT)
            elif label == _SECONDS:
                panel.set_yscale("log")
        drawn.append("curves.png")
        _saved(figure, os.path.join(folder, drawn[-1]))
    return drawn


def _standard_error(result: MethodResult, score: str) -> float:
    """Return the standard error of a share over the facts, or of S, whose three shares count as independent.

    Questions in other words about one fact stand or fall together: they count as one.
    """
    report = result.report
    assert report is not None
    shares, scores = [report.own_words], report.scores
    if score != _OWN_WORDS:
        shares = [scores.exact_match]
    if score == "S":
        shares = [scores.efficacy, scores.paraphrase, scores.neighbourhood]
    known = [share for share in shares if share is not None]
    if not all(known):  # the harmonic mean is 0
        return 0.0
    mean = len(known) / sum(1 / share for share in known)
    terms = ((mean**2 / (len(known) * share**2)) ** 2 * share * (1 - share) for share in known)
    return math.sqrt(sum(terms) / report.num_records)


def error_bars(panels: Mapping[str, Mapping[str, Sequence[float]]], label: str, path: Path | None = None) -> Figure:
    """Draw horizontal bars of means with error bars of one standard deviation, a panel for each title.

    Args:
        panels: Title to name of a bar to its values, of which one has no error bar; all panels have the same names.
        label: What the values are.
        path: As in `trace_heatmap`.

    Raises:
        ValueError: If there is no panel.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not panels:
        raise ValueError("`panels` is empty: give at least one.")
    names = list(next(iter(panels.values())))
    figure = _figure(2.5 + 3.2 * len(panels), 1.2 + 0.26 * len(names))
    for axes, (title, bars) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for place, name in enumerate(names):
            values = bars[name]
            spread = statistics.stdev(values) if len(values) > 1 else None
            axes.barh(place, statistics.fmean(values), xerr=spread, color="C0", ecolor="0.3", capsize=2)
        axes.set_yticks(range(len(names)), labels=names)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    return _saved(figure, path)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plots need matplotlib: run `pip install memory-adapters[plots]`.") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _check(metrics: Sequence[str], has_value: Callable[[str], bool]) -> None:
    if not metrics:
        raise ValueError("`metrics` is empty: name at least one score to draw.")
    missing = [metric for metric in metrics if not has_value(metric)]
    if missing:
        raise ValueError(f"`metrics` names scores of which there is no value: {missing}. Leave them out.")


def _label(metric: str) -> str:
    return metric.replace("_", " ")


def _tidy(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, ncols=_legend_columns(len(labels)))


def _legend_columns(lines: int) -> int:
    return math.ceil(lines / _LEGEND_LINES)


def _saved(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure
