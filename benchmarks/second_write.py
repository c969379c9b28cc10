"""What a second write does to the first: recall of both halves of the same facts.

    python benchmarks/second_write.py --data FOLDER [--records 20] [--output FILE]

Half of the records are written, then the other half; then, into a fresh memory, the first half and then all of them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import MemoryAdapterConfig, inject_memory
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.records import EditRecord, load_counterfact
from memory_adapters.evaluation.scores.edits import score_edits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("MEMORY_ADAPTERS_DATA"), help="folder with the data sets")
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("docs/results/second_write.json"))
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error("give --data or set MEMORY_ADAPTERS_DATA")
    name = arguments.model or embedded_model()
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    records = load_counterfact(Path(arguments.data) / "counterfact" / "edit.json", arguments.records)
    first, second = records[: len(records) // 2], records[len(records) // 2 :]

    def recall(part: Sequence[EditRecord]) -> float:
        return score_edits(model, tokenizer, part).exact_match

    results: dict[str, Any] = {"command": f"python benchmarks/second_write.py --records {arguments.records}"}
    for label, then in (("the other half", second), ("all, the first half again", records)):
        memory = inject_memory(model, MemoryAdapterConfig(), tokenizer=tokenizer)
        memory.write([record.fact for record in first])
        before = recall(first)
        memory.write([record.fact for record in then])
        results[label] = {"first half before": before, "first half": recall(first), "second half": recall(second)}
        print(label, results[label], flush=True)
        memory.remove()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
