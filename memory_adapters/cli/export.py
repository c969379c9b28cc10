"""`memory-adapters export`."""

from __future__ import annotations

from pathlib import Path

from memory_adapters.cli.run import Run
from memory_adapters.inject import load_memory
from memory_adapters.training.distributed import is_main_process

__all__ = ["export_memory"]


def export_memory(run: Run, adapter: str, model: str, file_format: str, output: Path, *, dtype: str) -> None:
    """Save a memory in a format that other programs load."""
    base, tokenizer = run.load_model(model, "auto", "--model")
    memory = load_memory(base, adapter, tokenizer=tokenizer)
    if is_main_process():
        made = memory.export(output, format=file_format, dtype=None if dtype == "auto" else dtype)
        run.show({"format": file_format, "output": str(made)}, f"saved in {made}")
