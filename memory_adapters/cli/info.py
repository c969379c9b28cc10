"""`memory-adapters info`."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import shorten
from typing import Any

from tabulate import tabulate

from memory_adapters.cli.run import Run
from memory_adapters.cli.saved_memory import SavedMemory
from memory_adapters.inject import load_memory
from memory_adapters.report import WriteReport

__all__ = ["describe"]

MOST_SHOWN = 60  # characters of a field of an item


def describe(run: Run, adapter: str, model: str | None, *, dtype: str) -> None:
    """Describe a saved memory, and say whether it fits a model."""
    saved = SavedMemory.find(adapter)
    result = _description(saved)
    if model is not None:
        result["unfit"] = _unfit(run, saved, model, dtype)
        result["fits"] = result["unfit"] is None
    run.show(result, _as_text(result))
    if result.get("unfit") is not None:
        run.missed(f"the memory does not fit {model}.")


def _description(saved: SavedMemory) -> dict[str, Any]:
    config = saved.config
    return {
        "adapter": str(saved.folder),
        "method": saved.method.name,
        "name": config.method_name,
        "base_model": config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "settings": config.card_settings(),
        "stored_numbers": saved.stored_numbers(),
        "writes": config.writes,
        "items": config.items,
    }


def _unfit(run: Run, saved: SavedMemory, model: str, dtype: str) -> str | None:
    """Return why the memory does not load into the model; None if it does."""
    base, tokenizer = run.load_model(model, dtype, "--model")
    try:
        load_memory(base, saved.folder, tokenizer=tokenizer)
    except ValueError as error:
        return str(error)
    return None


def _as_text(result: dict[str, Any]) -> str:
    fingerprint = {key: str(value)[:12] for key, value in (result["base_fingerprint"] or {}).items()}
    numbers = result["stored_numbers"]
    rows = {
        "method": f"{result['name']} (--method {result['method']})",
        "base model": result["base_model"] or "not named",
        "fingerprint": ", ".join(f"{key} {value}" for key, value in fingerprint.items()) or "none",
        "settings": ", ".join(f"{key}={value}" for key, value in result["settings"].items()) or "default",
    }
    if "fits" in result:
        rows["fits the model"] = "yes" if result["fits"] else f"no: {result['unfit']}"
    parts = [_table(rows.items())]
    parts.append(f"stored numbers  {sum(numbers.values()):,}\n{_table((f, f'{n:,}') for f, n in numbers.items())}")
    reports = [WriteReport.from_dict(write) for write in result["writes"]]
    parts += [f"write {i}\n{_table(report.rows())}" for i, report in enumerate(reports, 1)]
    if result["items"]:
        shown = [{name: _cell(value) for name, value in item.items()} for item in result["items"]]
        parts.append(f"{len(shown)} items\n{_table(shown, 'keys')}")
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    """Return a field of an item on one line, cut; several names with commas between them."""
    return shorten(", ".join(value) if isinstance(value, list) else str(value), MOST_SHOWN)


def _table(rows: Iterable[Any], headers: str = "") -> str:
    return tabulate(list(rows), headers or (), tablefmt="plain", disable_numparse=True)
