"""`memory-adapters export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memory_adapters.cli.options import (
    AdapterArgument,
    DebugOption,
    DeviceOption,
    Dtype,
    JsonOption,
    QuietOption,
)
from memory_adapters.cli.run import running
from memory_adapters.inject import load_memory
from memory_adapters.training.distributed import is_main_process

__all__ = ["export"]


def export(
    adapter: AdapterArgument,
    model: Annotated[str, typer.Option(metavar="MODEL", help="The model that the memory was written for.")],
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="One that the memory's method offers, such as vllm (a LoRA adapter for servers), gguf (a LoRA file "
            "for llama.cpp) or merged (the whole model). Another is an error that names those.",
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
        base, tokenizer = run.load_model(model, "auto")
        memory = load_memory(base, adapter, tokenizer=tokenizer)
        if is_main_process():
            made = memory.export(output, format=file_format, dtype=None if dtype == "auto" else dtype)
            run.show({"format": file_format, "output": str(made)}, f"saved in {made}")
