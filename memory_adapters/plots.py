"""Figures: where a model recalls facts, and how methods score. Needs matplotlib; global state of it is not touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memory_adapters.memit.tracing import TraceTable

__all__ = ["score_bars", "score_curves", "trace_heatmap"]

Path = str | os.PathLike[str]
_PANELS = {"hidden": "Block outputs", "mlp": "MLP outputs", "attention": "Attention outputs"}


def trace_heatmap(table: TraceTable, path: Path | None = None) -> Figure:
    """Average indirect effects by token role (rows) and layer (columns), one panel a kind, on one colour scale.

    Args:
        table: What `trace_facts` found.
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
    """Scores of methods side by side: a group of bars a metric, a colour a method; what is None has no bar.

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
    """Each metric over the number of edits or something else, on a logarithmic axis: a panel a metric, a line a method.

    Args:
        points: Name of a method to (number above 0, its scores then), in any order; what is None has no point.
        metrics: Which scores, from left to right.
        path: As in `trace_heatmap`.
        across: What the numbers are.

    Raises:
        ValueError: If `metrics` is empty, or no point has a value of one of them.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    scored = [scores for line in points.values() for _, scores in line]
    _check(metrics, lambda metric: any(scores.get(metric) is not None for scores in scored))
    figure = _figure(1.5 + 3.0 * len(metrics), 3.2)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        for i, (name, line) in enumerate(points.items()):
            known = sorted((x, scores[metric]) for x, scores in line if scores.get(metric) is not None)
            panel.plot([x for x, _ in known], [y for _, y in known], "o-", ms=4, color=f"C{i}", label=name)
        panel.set_xscale("log")
        places = sorted({x for line in points.values() for x, _ in line})
        panel.set_xticks(places, labels=[f"{x:g}" for x in places])
        panel.minorticks_off()
        panel.set_xlabel(across)
        panel.set_title(_label(metric), fontsize=10)
        panel.grid(alpha=0.3)
    _tidy(figure, panels[0])
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
    figure.legend(handles, labels, loc="outside right upper", frameon=False)


def _saved(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure
