"""Measure what a second write does to the first: recall of the first facts after it ÷ before it.

    python benchmarks/second_write.py --data FOLDER [--records 20]

Half of the records are written, then the other half; then, into a fresh memory, the first half and then all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common import BenchmarkParser, counterfact, load_model, save
from memory_adapters import MemoryAdapterConfig, inject_memory
from memory_adapters.evaluation.records import EditRecord
from memory_adapters.evaluation.scores.edits import score_edits


def main() -> None:
    parser = BenchmarkParser(__doc__, "second_write", data=True)
    parser.add_argument("--records", type=int, default=20, quick=2)
    arguments = parser.parse()
    model, tokenizer = load_model(arguments)
    records = counterfact(arguments, arguments.records)
    first, second = records[: len(records) // 2], records[len(records) // 2 :]

    def recall(part: Sequence[EditRecord]) -> float:
        return score_edits(model, tokenizer, part).exact_match

    results: dict[str, Any] = {}
    for label, then in (("the other half", second), ("all, the first half again", records)):
        memory = inject_memory(model, MemoryAdapterConfig(seed=arguments.seed), tokenizer=tokenizer)
        memory.write([record.fact for record in first])
        before = recall(first)
        memory.write([record.fact for record in then])
        row = {"first half before": before, "first half": recall(first), "second half": recall(second)}
        results[label] = row | {"first half ÷ before": row["first half"] / before if before else None}
        print(label, results[label], flush=True)
        memory.remove()
    save(arguments, results)


if __name__ == "__main__":
    main()
