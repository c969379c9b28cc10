"""`memory-adapters write`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.cli.messages import wrong
from memory_adapters.cli.run import Run
from memory_adapters.cli.saved_memory import SavedMemory, with_settings
from memory_adapters.cli.settings import check_config, check_names, method_named, parse_pairs
from memory_adapters.files.item_files import read_items
from memory_adapters.files.model_card import hub_id
from memory_adapters.files.names import CONFIG_FILES
from memory_adapters.inject import inject_memory, load_memory
from memory_adapters.items import Document, Item
from memory_adapters.memory import Memory
from memory_adapters.registry import Method
from memory_adapters.training.distributed import is_main_process

__all__ = ["write_items"]


def write_items(
    run: Run,
    model: str,
    items: Path,
    output: Path,
    *,
    method: str | None,
    adapter: str | None,
    settings: Sequence[str],
    options: Sequence[str],
    min_recall: float | None,
    push: str | None,
    private: bool,
    base_model: str | None,
    dtype: str,
) -> None:
    """Write the items of a file into a memory for a model, and save it."""
    taught = read_items(items)
    _check(taught, output, adapter, min_recall)
    _check_base_model(model, push, base_model)
    saved = None if adapter is None else SavedMemory.find(adapter)
    chosen = _method(method, saved)
    fields = parse_pairs("--set", settings)
    check_names("--set", chosen.config_class.__name__, "field", fields, chosen.config_class.settable_fields())
    check_config(chosen, fields)
    given = parse_pairs("--option", options)
    check_names("--option", f"The write of {chosen.name}", "option", given, chosen.memory_class.write_options())
    base, tokenizer = run.load_model(model, dtype)
    memory = _memory(base, tokenizer, chosen, saved, fields)
    report = memory.write(taught, progress=run.progress, **given)
    commit = None
    if is_main_process():
        memory.save_pretrained(output)
        commit = None if push is None else memory.push_to_hub(push, private=private or None, base_model=base_model)
    said = f"{report}\nsaved in {output}" + ("" if commit is None else f"\npushed: {commit}")
    run.show({**report.to_dict(), "output": str(output), "commit": commit}, said)
    if min_recall is None and report.nothing_learned:
        run.missed(
            "nothing was learned: none of the facts and questions is recalled; it is saved anyway. Try another "
            "--method, more steps (--set), or fewer items; `memory-adapters evaluate --per-item` shows what the model "
            "says."
        )
    if min_recall is not None and (report.recall or 0.0) < min_recall:
        run.missed(f"missed: {report.recall:.1%} are recalled, --min-recall is {min_recall:.1%}; it is saved anyway.")


def _check(taught: Sequence[Item], output: Path, adapter: str | None, min_recall: float | None) -> None:
    if min_recall is not None and all(isinstance(item, Document) for item in taught):
        raise wrong("--min-recall", "it needs facts or questions, and ITEMS has documents alone.")
    holds = any((output / name).exists() for name in CONFIG_FILES)
    if holds and (adapter is None or Path(adapter).resolve() != output.resolve()):
        raise wrong(
            "--output", f"{output} holds another memory: name a new folder, or write more into it by --adapter."
        )


def _check_base_model(model: str, push: str | None, base_model: str | None) -> None:
    if push is not None and base_model is None and model != "embedded" and hub_id(model) is None:
        raise wrong("--base-model", f"--push needs it: {model} is a local folder, which nobody else has.")


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
