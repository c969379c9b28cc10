"""`memory-adapters info`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from memory_adapters import MemorySlots, load_memory
from memory_adapters.cli.options import (
    AdapterArgument,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    QuietOption,
)
from memory_adapters.cli.run import Run, running
from memory_adapters.cli.saved_memory import SavedMemory

__all__ = ["info"]


def info(
    adapter: AdapterArgument,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also load this model, and say whether the memory fits it.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what the memory ADAPTER is and holds.

    Read from its files; no model is loaded unless --model names one.
    """
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        saved = SavedMemory.find(adapter)
        result = _description(saved)
        if model is not None:
            result["unfit"] = _unfit(run, saved, model, dtype)
            result["fits"] = result["unfit"] is None
        run.show(result, _told(result))
        if result.get("unfit") is not None:
            run.missed(f"the memory does not fit {model}.")


def _description(saved: SavedMemory) -> dict[str, Any]:
    config: Any = saved.config
    slots_file = saved.folder / MemorySlots.file
    slots = MemorySlots.load(slots_file) if slots_file.is_file() and getattr(config, "has_slots", False) else None
    settings = {name: value for name, value in config.card_settings().items() if name != "layers"}
    return {
        "adapter": str(saved.folder),
        "method": saved.method,
        "name": config.method_name,
        "base_model": config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "layers": getattr(config, "layers", None),
        "settings": settings,
        "stored_numbers": saved.stored_numbers(),
        "writes": config.writes,
        "facts": getattr(config, "facts", None),
        "slots": None
        if slots is None
        else {
            "num_slots": slots.num_slots,
            "num_tokens": slots.num_tokens,
            "compression_rate": slots.compression_rate,
            "num_spans": slots.num_spans,
            "refine_steps": slots.refine_steps,
        },
    }


def _unfit(run: Run, saved: SavedMemory, model: str, dtype: str) -> str | None:
    """Why the memory does not load into the model; None if it does."""
    base, tokenizer = run.load_model(model, dtype)
    try:
        load_memory(base, saved.folder, tokenizer=tokenizer)
    except ValueError as error:
        return str(error)
    return None


def _told(result: dict[str, Any]) -> str:
    fingerprint = {key: str(value)[:12] for key, value in (result["base_fingerprint"] or {}).items()}
    numbers = result["stored_numbers"]
    rows = [
        ("method", f"{result['name']} (--method {result['method']})"),
        ("base model", result["base_model"] or "not named"),
        ("fingerprint", ", ".join(f"{key} {value}" for key, value in fingerprint.items()) or "none"),
        ("layers", result["layers"]),
        ("settings", ", ".join(f"{key}={value}" for key, value in result["settings"].items()) or "default"),
        ("stored numbers", f"{sum(numbers.values()):,}"),
        *((f"  {file}", f"{number:,}") for file, number in numbers.items()),
    ]
    for i, written in enumerate(result["writes"], 1):
        rows += [(f"write {i}", ""), *((f"  {key}", value) for key, value in written.items())]
    if result["facts"]:
        rows += [("facts", len(result["facts"]))]
        rows += [("", f"{fact['prompt']} → {fact['target']}") for fact in result["facts"]]
    if result["slots"]:
        rows += [("slots", ""), *((f"  {key}", f"{value:g}") for key, value in result["slots"].items())]
    if "fits" in result:
        rows += [("fits the model", "yes" if result["fits"] else f"no: {result['unfit']}")]
    shown = [(key, value) for key, value in rows if value is not None]
    width = max(len(key) for key, _ in shown)
    return "\n".join(f"{key:<{width}}  {value}".rstrip() for key, value in shown)
