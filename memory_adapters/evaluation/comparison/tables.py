"""Tables of a comparison: aligned, in Markdown, in HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from memory_adapters.evaluation.edit_report import EditReport, comparable_cells

if TYPE_CHECKING:
    from memory_adapters.evaluation.comparison.results import Comparison, MethodResult

__all__ = ["Table", "aligned", "as_html", "as_markdown", "as_text", "score_table", "tables"]

SHOWN = ("S", "ES", "PS", "NS", "exact", "perplexity")
SCORES = ("S", "ES", "PS", "NS", "exact", "greedy", "portability exact", "portability tokens", "GE", "ability")
COSTS = ("write, s", "CPU, s", "forget, s", "on disk", "prefill", "decode", "peak memory", "stored numbers")
UNKNOWN = "–"


class Table(NamedTuple):
    """Rows of cells under a title; the first row is the header, the first column names."""

    title: str
    rows: list[list[str]]


def tables(comparison: Comparison) -> list[Table]:
    """The scores, the costs and, where there are curves, what they show by number of facts."""
    methods = comparison.methods
    labels = {name: f"{name} (failed)" if result.failed else name for name, result in methods.items()}
    scores = {labels[name]: _scores(result, comparison.base.perplexity) for name, result in methods.items()}
    costs = {labels[name]: _costs(result) for name, result in methods.items()}
    found = [
        Table(f"{comparison.num_facts:,} facts; scores in %", _rows(scores, (*SCORES, "perplexity"))),
        Table("Costs", _rows(costs, COSTS)),
    ]
    quality = "S" if comparison.base.scores.score is not None else "exact"
    shown: dict[str, Callable[[MethodResult], str]] = {
        f"{quality} by number of facts, in %": lambda result: _scores(result, None)[quality],
        "Perplexity by number of facts": lambda result: _scores(result, comparison.base.perplexity)["perplexity"],
        "Seconds to write by number of facts": lambda result: _costs(result).get("write, s", UNKNOWN),
    }
    for title, cell in shown.items() if comparison.curves else ():
        lines = {
            name: {f"{number:,}": "failed" if result.failed else cell(result) for number, result in line.items()}
            for name, line in comparison.curves.items()
        }
        found.append(Table(title, _rows(lines, list(next(iter(lines.values()))))))
    return found


def _scores(result: MethodResult, base_perplexity: float | None) -> dict[str, str]:
    if result.report is None:
        return {}
    cells = comparable_cells(result.report, base_perplexity)
    if result.portability is not None:
        other = comparable_cells(result.portability, None)
        cells |= {label: other[label] for label in ("portability exact", "portability tokens")}
    return cells | ({} if result.ability is None else {"ability": f"{100 * result.ability:.1f}"})


def _costs(result: MethodResult) -> dict[str, str]:
    costs = result.costs
    if costs is None or result.write is None or not result.write.num_parameters:
        return {}
    cells = {
        "write, s": f"{costs.seconds:.1f}",
        "CPU, s": f"{costs.cpu_seconds:.1f}",
        "peak memory": _size(costs.peak_memory),
        "stored numbers": f"{result.write.num_parameters:,}",
    }
    if costs.bytes_on_disk is not None:
        cells["on disk"] = _size(costs.bytes_on_disk)
        cells["forget, s"] = "= write" if costs.forget_seconds is None else f"{costs.forget_seconds:.2f}"
    if costs.prefill is not None and costs.decode is not None:
        cells |= {"prefill": f"×{costs.prefill:.2f}", "decode": f"×{costs.decode:.2f}"}
    return cells


def _failures(comparison: Comparison) -> list[str]:
    return [f"{where}: {result.failed}" for where, result in comparison.failures().items()]


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _rows(found: Mapping[str, Mapping[str, str]], labels: Sequence[str]) -> list[list[str]]:
    """A line for each of `found`, below a header; columns without any value are left out."""
    shown = [label for label in labels if any(cells.get(label, UNKNOWN) != UNKNOWN for cells in found.values())]
    return [["", *shown], *([name, *(cells.get(label, UNKNOWN) for label in shown)] for name, cells in found.items())]


def score_table(reports: Mapping[str, EditReport]) -> list[list[str]]:
    """Cells of a table with a line for each report, the first row a header: S, ES, PS, NS and exact match in percent,
    perplexity also as its drift from the first report's. Columns without any value are left out."""
    base = next(iter(reports.values())).perplexity
    return _rows({name: comparable_cells(report, base) for name, report in reports.items()}, SHOWN)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"  {'  '.join(line)}".rstrip() for line in cells)


def as_text(comparison: Comparison) -> str:
    """For the terminal."""
    parts = [f"{title}\n{aligned(rows)}" for title, rows in tables(comparison)]
    failures = "\n".join(f"failed: {line}" for line in _failures(comparison))
    return "\n\n".join(["Comparison: " + parts[0], *parts[1:], *([failures] if failures else [])])


def as_markdown(comparison: Comparison) -> str:
    """Tables under headings, and a list of what failed."""
    parts = []
    for title, (header, *rows) in tables(comparison):
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        escaped = [[cell.replace("|", r"\|") for cell in cells] for cells in lines]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)
        parts.append(f"## {title}\n\n{table}")
    failures = "\n".join(f"- {line}" for line in _failures(comparison))
    return "\n\n".join([*parts, *([f"## Failed\n\n{failures}"] if failures else [])]) + "\n"


def as_html(comparison: Comparison) -> str:
    """For notebooks."""
    parts = []
    for title, table in tables(comparison):
        header, *rows = [[html.escape(cell) for cell in row] for row in table]
        lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in header)}</tr>"]
        lines += [f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for name, *row in rows]
        parts.append(f"<table><caption>{html.escape(title)}</caption>{''.join(lines)}</table>")
    return "".join([*parts, *(f"<p>failed: {html.escape(line)}</p>" for line in _failures(comparison))])
