"""`memory-adapters write`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.cli.options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    PrivateOption,
    PushOption,
    QuietOption,
)
from memory_adapters.cli.run import running, wrong
from memory_adapters.cli.saved_memory import SavedMemory, with_settings
from memory_adapters.cli.settings import check_config, check_names, method_named, parse_pairs
from memory_adapters.files.item_files import read_items
from memory_adapters.files.names import CONFIG_FILES
from memory_adapters.inject import inject_memory, load_memory
from memory_adapters.items import Document, Item
from memory_adapters.memory import Memory
from memory_adapters.registry import Method, methods
from memory_adapters.training.distributed import is_main_process

__all__ = ["write"]


def write(
    model: ModelArgument,
    items: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="ITEMS",
            help='What to write: a .json list or a .jsonl file of {"prompt", "subject", "target"}, '
            '{"question", "answer"} and {"text"}, or a .txt file as one document. Not every method takes all kinds.',
        ),
    ],
    output: Annotated[
        Path, typer.Option(file_okay=False, metavar="FOLDER", help="Where to save; holds no other memory yet.")
    ],
    method: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help=f"One of {', '.join(methods())}. Needed without --adapter."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="ADAPTER", help="Write more into this saved memory (a folder, which may be --output, or a Hub id)."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A field of the method's config, as JSON or else as a string; repeat for several.",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="An option of the method's write, as JSON or else as a string; repeat for several.",
        ),
    ] = None,
    min_recall: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="End with exit code 3 if a smaller share of facts and questions is recalled."),
    ] = None,
    push: PushOption = None,
    private: PrivateOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write ITEMS into a memory for MODEL, and save it."""
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        taught = read_items(items)
        _check(taught, output, method, adapter, min_recall, push, private)
        saved = None if adapter is None else SavedMemory.find(adapter)
        chosen = _method(method, saved)
        fields = parse_pairs("--set", settings or [])
        check_names("--set", chosen.config_class.__name__, "field", fields, chosen.config_class.settable_fields())
        check_config(chosen, fields)
        given = parse_pairs("--option", options or [])
        check_names("--option", f"The write of {chosen.name}", "option", given, chosen.memory_class.write_options())
        base, tokenizer = run.load_model(model, dtype)
        memory = _memory(base, tokenizer, chosen, saved, fields)
        report = memory.write(taught, progress=run.progress, **given)
        commit = None
        if is_main_process():
            memory.save_pretrained(output)
            commit = None if push is None else memory.push_to_hub(push, private=private or None)
        said = f"{report}\nsaved in {output}" + ("" if commit is None else f"\npushed: {commit}")
        run.show({**report.to_dict(), "output": str(output), "commit": commit}, said)
        if min_recall is not None and (report.recall or 0.0) < min_recall:
            run.missed(
                f"missed: {report.recall:.1%} are recalled, --min-recall is {min_recall:.1%}; it is saved anyway."
            )


def _check(
    taught: Sequence[Item],
    output: Path,
    method: str | None,
    adapter: str | None,
    min_recall: float | None,
    push: str | None,
    private: bool,
) -> None:
    if method is None and adapter is None:
        raise wrong("--method", f"give one of {', '.join(methods())}, or a memory with --adapter.")
    if private and push is None:
        raise wrong("--private", "it is for --push, which is not given.")
    if min_recall is not None and all(isinstance(item, Document) for item in taught):
        raise wrong("--min-recall", "it needs facts or questions, and ITEMS has documents alone.")
    holds = any((output / name).exists() for name in CONFIG_FILES)
    if holds and (adapter is None or Path(adapter).resolve() != output.resolve()):
        raise wrong(
            "--output", f"{output} holds another memory: name a new folder, or write more into it by --adapter."
        )


def _method(name: str | None, saved: SavedMemory | None) -> Method:
    if saved is None:
        assert name is not None
        return method_named(name)
    if name not in (None, saved.method.name):
        raise wrong("--method", f"the memory of --adapter is of the method {saved.method.name}; leave --method out.")
    return saved.method


def _memory(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    saved: SavedMemory | None,
    fields: dict[str, Any],
) -> Memory[Any]:
    if saved is None:
        return inject_memory(base, method.config_class(**fields), tokenizer=tokenizer)
    with with_settings(saved, fields) as folder:
        try:
            return load_memory(base, folder, tokenizer=tokenizer)
        except ValueError as error:
            if not fields:
                raise
            raise wrong(
                "--set", f"the memory of --adapter does not load with {', '.join(fields)} changed: {error}"
            ) from None
