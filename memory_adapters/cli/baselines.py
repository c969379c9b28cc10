"""Make the baselines of `memory-adapters compare`, by name, with the settings of the command line."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any

from memory_adapters.cli.messages import wrong
from memory_adapters.cli.saved_memory import SavedMemory, with_settings
from memory_adapters.cli.settings import check_config, check_names, method_named, parse_pairs
from memory_adapters.evaluation.comparison.baselines import (
    Baseline,
    FineTuned,
    Lora,
    Together,
    Unchanged,
    WrittenMemory,
)
from memory_adapters.evaluation.comparison.finetuning import Recipe
from memory_adapters.evaluation.comparison.results import NOTHING
from memory_adapters.registry import Method, Variant, methods

__all__ = ["Baselines", "baseline_names"]

TRAINED: dict[str, Lora | FineTuned] = {
    "lora": Lora(),
    "lora_slow": Lora(recipe=Recipe(learning_rate=1e-4)),
    "lora_rehearsed": Lora(recipe=Recipe(learning_rate=1e-3, rehearsal=50)),
    "full": FineTuned(),
}
TOGETHER = "+"
_TYPES: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "Mapping[str, Any]": (dict,)}
Memories = dict[str, tuple[Method, Variant]]


def baseline_names() -> list[str]:
    """Return the names that `--methods` takes: variants of the registered methods, and the other baselines."""
    return [*_variants(), *TRAINED, NOTHING]


class Baselines:
    """Make baselines as the command line names them; wrong settings are refused before a model is loaded.

    Args:
        names: Names, separated by commas; None for all but those that need a saved memory which is not given. Memories
            that are to act together have a plus between their names.
        pairs: `NAME.FIELD=VALUE` each: a field of the config or an option of the write of a method, for all of its
            variants, or of one variant; or a field of the training of all weights or of a LoRA.
        starts: `METHOD=ADAPTER` each: the saved memory that the method's variants start from.
    """

    def __init__(self, names: str | None, pairs: Sequence[str], starts: Sequence[str]) -> None:
        variants, given = _variants(), _parse_starts(starts)
        missing = [name for name, (method, v) in variants.items() if v.start == "saved" and method.name not in given]
        known = baseline_names()
        self.names = [name for name in known if name not in missing]
        if names is not None:
            self.names = [name.strip() for name in names.split(",")]
        joined = {name: name.split(TOGETHER) for name in self.names}
        chosen = list(dict.fromkeys(part for parts in joined.values() for part in parts))
        if not set(chosen) <= set(known) or len(joined) < len(self.names):
            raise wrong("--methods", f"{names!r} must name some of {', '.join(known)}, each once.")
        for name, parts in joined.items():
            if len(parts) > 1 and (not set(parts) <= set(variants) or len(set(parts)) < len(parts)):
                raise wrong("--methods", f"{name} must join different memories: some of {', '.join(variants)}.")
        for name in chosen:
            if name in missing:
                start = f"--start {variants[name][0].name}=ADAPTER"
                raise wrong("--methods", f"{name} starts from a saved memory: give one with {start}.")
        memories = {name: variants[name] for name in chosen if name in variants}
        for started in given:
            able = [name for name, (method, v) in variants.items() if method.name == started and v.start != "fresh"]
            if not set(able) & set(memories):
                raise wrong("--start", f"it is for {', '.join(able) or 'no variant'}, which --methods leaves out.")
        owners = [name for name in chosen if name != NOTHING] + [method.name for method, _ in memories.values()]
        values = _by_owner(pairs, list(dict.fromkeys(owners)))
        self.memories: Memories = {
            name: (method, _with_values(name, method, variant, values)) for name, (method, variant) in memories.items()
        }
        self.trained = {name: _training_settings(name, values[name]) for name in chosen if name in TRAINED}
        self.starts = {method: _saved_start(method, adapter) for method, adapter in given.items()}

    def baselines(self, stack: ExitStack, progress: bool) -> dict[str, Baseline]:
        """Return the baselines by name; the files that they need exist until `stack` is closed."""
        return {name: self._baseline(name, stack, progress) for name in self.names}

    def _baseline(self, name: str, stack: ExitStack, progress: bool) -> Baseline:
        if name == NOTHING:
            return Unchanged()
        if name in TRAINED:
            return _trained(name, self.trained[name], progress)
        if TOGETHER in name:
            return Together([self._memory(part, stack, progress) for part in name.split(TOGETHER)])
        return self._memory(name, stack, progress)

    def _memory(self, name: str, stack: ExitStack, progress: bool) -> WrittenMemory:
        method, variant = self.memories[name]
        options = {"progress": progress, **variant.write_options}
        start = self.starts.get(method.name)
        if start is None or variant.start == "fresh":
            return WrittenMemory(method.config_class(**variant.settings), options)
        return WrittenMemory(str(stack.enter_context(with_settings(start, variant.settings))), options)


def _variants() -> Memories:
    return {name: (method, variant) for method in methods().values() for name, variant in method.variants.items()}


def _parse_starts(starts: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in starts:
        name, equals, adapter = pair.partition("=")
        if not equals:
            raise wrong("--start", f"{pair!r} names no saved memory: write METHOD=ADAPTER.")
        found[method_named(name, "--start").name] = adapter
    return found


def _saved_start(method: str, adapter: str) -> SavedMemory:
    saved = SavedMemory.find(adapter)
    if saved.method.name != method:
        raise wrong("--start", f"{adapter} is of the method {saved.method.name}; give one of {method}.")
    return saved


def _by_owner(pairs: Sequence[str], owners: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse `OWNER.NAME=VALUE` pairs."""
    texts: dict[str, list[str]] = {owner: [] for owner in owners}
    for pair in pairs:
        owner, _, text = pair.partition(".")
        if owner not in texts:
            raise wrong("--set", f"{pair!r} must begin with one of {', '.join(owners)} and a dot.")
        texts[owner].append(text)
    return {owner: parse_pairs("--set", own) for owner, own in texts.items()}


def _with_values(name: str, method: Method, variant: Variant, values: Mapping[str, Mapping[str, Any]]) -> Variant:
    """Return the variant with the values given for it, and below its own those given for all of the method."""
    own, shared = values[name], {} if name == method.name else values[method.name]
    settable, options = method.config_class.settable_fields(), method.memory_class.write_options()
    for owner, given in ((name, own), (method.name, shared)):
        check_names("--set", owner, "field or option", given, {*settable, *options})
    settings = {**_part(shared, settable), **variant.settings, **_part(own, settable)}
    check_config(method, settings)
    if changed := _part(own, variant.settings):
        distinctive = replace(variant, settings=_part(settings, variant.settings))
        for other, same in method.variants.items():
            if other != name and same == distinctive:
                raise wrong("--set", f"with {', '.join(changed)} changed, {name} is {other}: name that in --methods.")
    options = [option for option in options if option not in settable]
    write = {**_part(shared, options), **variant.write_options, **_part(own, options)}
    return replace(variant, settings=settings, write_options=write)


def _part(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _training_settings(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check fields of a recipe, or of a LoRA its rank."""
    known = {field.name: _TYPES[str(field.type)] for field in fields(Recipe)}
    if isinstance(TRAINED[name], Lora):
        known["rank"] = (int,)
    check_names("--set", name, "field", values, known)
    for field, value in values.items():
        if type(value) not in known[field]:
            kinds = " or ".join(kind.__name__ for kind in known[field])
            raise wrong("--set", f"`{name}.{field}` must be of the type {kinds}, got {value!r}.")
    return dict(values)


def _trained(name: str, settings: Mapping[str, Any], progress: bool) -> Baseline:
    own = {field: value for field, value in settings.items() if field == "rank"}
    recipe = {field: value for field, value in settings.items() if field != "rank"}
    args = {"disable_tqdm": not progress, **recipe.pop("training_args", {})}
    return replace(TRAINED[name], recipe=replace(TRAINED[name].recipe, **recipe, training_args=args), **own)
