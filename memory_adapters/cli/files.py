"""`memory-adapters export` and `info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from memory_adapters import MemorySlots, load_memory
from memory_adapters.cli.adapters import SavedMemory
from memory_adapters.cli.options import (
    AdapterArgument,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    QuietOption,
)
from memory_adapters.cli.run import Run, running
from memory_adapters.processes import is_first

__all__ = ["export", "info"]


def export(
    adapter: AdapterArgument,
    model: Annotated[str, typer.Option(metavar="MODEL", help="The model that the memory was written for.")],
    file_format: Annotated[
        Literal["vllm", "gguf", "merged", "prompt-tuning"],
        typer.Option(
            "--format",
            help="vllm (a LoRA adapter for servers), gguf (a LoRA file for llama.cpp), merged (the edited model), "
            "prompt-tuning (slots as a PEFT adapter). The first three are for memit, the last is for slots.",
        ),
    ],
    output: Annotated[Path, typer.Option(file_okay=False, metavar="FOLDER", help="Where to save it.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Precision of the exported tensors; auto is the format's own default.")
    ] = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Save the memory ADAPTER in a format that other programs load."""
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        from memory_adapters.export import export as saved_as

        base, tokenizer = run.load_model(model, "auto")
        memory = load_memory(base, adapter, tokenizer=tokenizer)
        if is_first():
            made = saved_as(memory, output, format=file_format, dtype=None if dtype == "auto" else dtype)
            run.show({"format": file_format, "output": str(made)}, f"saved in {made}")


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
