"""The same facts written by several methods, one after the other, and what each made of them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from memory_adapters.config import MemoryConfig
from memory_adapters.evaluation.records import EditRecord
from memory_adapters.evaluation.report import EditReport, comparable_cells, evaluate_edits
from memory_adapters.inject import inject_memory
from memory_adapters.memory import WriteReport
from memory_adapters.unrelated import sample_text

__all__ = ["Comparison", "MethodResult", "compare", "score_table"]

SAMPLED_TEXTS = 16
SAMPLED_TOKENS = 64
SAMPLE_SEED = 1_000_003  # of no method's default: nothing was fitted to this text
SHOWN = ("S", "ES", "PS", "NS", "exact", "perplexity")


@dataclass(frozen=True)
class MethodResult:
    """What one method made of the facts.

    Attributes:
        write: What its `write` reported: `seconds` is its wall time, `num_parameters` the numbers that the memory
            stores (of memory slots: those of the encoder).
        report: The scores with its memory on the model.
    """

    write: WriteReport
    report: EditReport


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` measured.

    Attributes:
        base: Scores of the model without a memory.
        methods: Name of a config to what its method made of the facts, in the order given.
    """

    base: EditReport
    methods: dict[str, MethodResult]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def rows(self) -> list[list[str]]:
        """Cells of the table; the first row is the header."""
        reports = {"base": self.base} | {name: result.report for name, result in self.methods.items()}
        costs = [["write, s", "stored numbers"], ["–", "–"]]
        costs += [[f"{r.write.seconds:.1f}", f"{r.write.num_parameters:,}"] for r in self.methods.values()]
        return [scores + cost for scores, cost in zip(score_table(reports), costs, strict=True)]

    def __repr__(self) -> str:
        return f"Comparison ({self.base.num_records} facts; scores in %)\n{aligned(self.rows())}"

    def _repr_html_(self) -> str:
        header, *rows = [[html.escape(cell) for cell in row] for row in self.rows()]
        lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in header)}</tr>"]
        lines += [f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for name, *row in rows]
        return f"<table><caption>{self.base.num_records} facts; scores in %</caption>{''.join(lines)}</table>"


def score_table(reports: Mapping[str, EditReport]) -> list[list[str]]:
    """Cells of a table with a line for each report, the first row a header: S, ES, PS, NS and exact match in percent,
    perplexity also as its drift from the first report's. Columns without any value are left out."""
    base = next(iter(reports.values())).perplexity
    found = {name: comparable_cells(report, base) for name, report in reports.items()}
    shown = [label for label in SHOWN if any(cells[label] != "–" for cells in found.values())]
    return [["", *shown], *([name, *(cells[label] for label in shown)] for name, cells in found.items())]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"  {'  '.join(line)}".rstrip() for line in cells)


def compare(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[EditRecord],
    configs: Mapping[str, MemoryConfig],
    *,
    text: str | Sequence[str] | None = None,
    max_text_tokens: int | None = None,
    write_settings: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
) -> Comparison:
    """Score the model, then write the records' facts with each method in turn, score, and take the memory out again.

    Every method gets all facts in one `write`. Configs that the model or tokenizer cannot have are refused before
    anything is measured. The model is left as it was, also on failure.

    Args:
        model: A causal LM; memories that are active on it stay active, and belong to the base.
        tokenizer: Its tokenizer.
        records: Facts, with the prompts to judge them by.
        configs: Name to the config of a method; the same method may come several times with other settings.
        text: Unrelated text for the perplexity, read by the model alone and with each memory; None for 1,024 tokens
            that the model samples.
        max_text_tokens: Most tokens of it that are read; None for all.
        write_settings: Name of a config to keyword arguments of its memory's `write`.
        progress: Show the bars of the scoring. Those of a `write` are turned off through `write_settings`.

    Raises:
        ValueError: If there is no record or config, `write_settings` has a name that `configs` lacks, or as
            `inject_memory` and `write`.
        TypeError: If a config is of no memory method.
    """
    if not records:
        raise ValueError("`records` is empty: give at least one EditRecord.")
    if not configs:
        raise ValueError("`configs` is empty: give at least one memory config by name.")
    settings = write_settings or {}
    if strange := sorted(set(settings) - set(configs)):
        raise ValueError(f"`write_settings` is for {strange}, but `configs` has {sorted(configs)}.")
    for config in configs.values():
        inject_memory(model, config, tokenizer=tokenizer).remove()
    if text is None:
        empty = [""] * SAMPLED_TEXTS
        text = sample_text(model, tokenizer, empty, num_tokens=SAMPLED_TOKENS, seed=SAMPLE_SEED)

    def scores() -> EditReport:
        return evaluate_edits(
            model, tokenizer, records, text=text, max_text_tokens=max_text_tokens, greedy=False, progress=progress
        )

    base, results = scores(), {}
    for name, config in configs.items():
        memory = inject_memory(model, config, tokenizer=tokenizer)
        try:
            written = memory.write([record.fact for record in records], **settings.get(name, {}))
            results[name] = MethodResult(written, scores())
        finally:
            memory.remove()
    return Comparison(base, results)
