"""What `memory-adapters compare` compares, by name, with the settings of the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any

from memory_adapters import MemitConfig, MemoryAdapterConfig, MemorySlotsConfig
from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.cli.run import wrong
from memory_adapters.cli.saved_memory import SavedMemory, parsed_settings, with_settings, write_options
from memory_adapters.config import MemoryConfig
from memory_adapters.evaluation.comparison.baselines import (
    Baseline,
    FineTuned,
    InPrompt,
    Lora,
    Memorised,
    Unchanged,
)
from memory_adapters.evaluation.comparison.finetuning import Recipe
from memory_adapters.evaluation.comparison.results import NOTHING

__all__ = ["NAMES", "Baselines"]

REFINE_STEPS = 100  # of slots that start from a trained encoder, which by default are not refined
SOLVERS = ("memit", "alphaedit", "emmet")
CONFIGS: dict[str, type[MemoryConfig]] = {
    "residual": MemoryAdapterConfig,
    **dict.fromkeys(SOLVERS, MemitConfig),
    "encoder": MemorySlotsConfig,
    "slots": MemorySlotsConfig,
}
TRAINED: dict[str, Callable[..., Lora | FineTuned]] = {"lora": Lora, "full": FineTuned}
NAMES = (*CONFIGS, *TRAINED, "prompt", NOTHING)
_VALUES: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "Mapping[str, Any]": (dict,)}


class Baselines:
    """Baselines as the command line names them; wrong settings are refused at once, before a model is loaded.

    Args:
        methods: Names, separated by commas; None for all that need no further option.
        pairs: `METHOD.FIELD=VALUE` each.
        encoder: Saved slot encoder, a folder or a Hub id; None for none.
        covariance: Saved covariance for the edits; None for one of text that the model samples.
    """

    def __init__(self, methods: str | None, pairs: Sequence[str], encoder: str | None, covariance: str | None) -> None:
        usable = [name for name in NAMES if name != "encoder" or encoder is not None]
        self.names = usable if methods is None else [name.strip() for name in methods.split(",")]
        if not set(self.names) <= set(NAMES) or len(set(self.names)) < len(self.names):
            raise wrong("--methods", f"{methods!r} must name some of {', '.join(NAMES)}, each once.")
        if not set(self.names) <= set(usable):
            raise wrong("--methods", "encoder is a trained one: give it with --encoder.")
        if encoder is not None and not {"encoder", "slots"} & set(self.names):
            raise wrong("--encoder", "it is for encoder and slots, which --methods leaves out.")
        if covariance is not None and not set(SOLVERS) & set(self.names):
            raise wrong("--covariance", f"it is for {', '.join(SOLVERS)}, which --methods leaves out.")
        own: dict[str, list[str]] = {name: [] for name in self.names if name in CONFIGS or name in TRAINED}
        for pair in pairs:
            name, _, field = pair.partition(".")
            if name not in own:
                raise wrong("--set", f"{pair!r} must begin with one of {', '.join(own)} and a dot.")
            own[name].append(field)
        self.settings = {
            name: parsed_settings(CONFIGS[name], given) if name in CONFIGS else _trained_settings(name, given)
            for name, given in own.items()
        }
        for name in set(SOLVERS) & set(self.settings):
            if self.settings[name].setdefault("solver", name) != name:
                raise wrong("--set", f"{name}.solver cannot be another one: name that in --methods.")
        self.encoder = None if encoder is None else SavedMemory.find(encoder)
        if self.encoder is not None and self.encoder.method != "slots":
            raise wrong("--encoder", f"{encoder} is of the method {self.encoder.method}; give one of slots.")
        self.covariance = covariance

    def baselines(self, model: Any, stack: ExitStack, progress: bool) -> dict[str, Baseline]:
        """Baselines by name; what they need of the disk is there until `stack` is closed."""
        return {name: self._contender(name, model, stack, progress) for name in self.names}

    def _contender(self, name: str, model: Any, stack: ExitStack, progress: bool) -> Baseline:
        settings = self.settings.get(name, {})
        if name in TRAINED:
            return _trained(name, settings, self._numbers_of_a_residual_memory(model), progress)
        if name not in CONFIGS:
            return Unchanged() if name == NOTHING else InPrompt()
        config_class = CONFIGS[name]
        options = write_options("residual" if config_class is MemoryAdapterConfig else name, progress)
        if config_class is MemitConfig and self.covariance is not None:
            options["covariance"] = self.covariance
        if self.encoder is None or config_class is not MemorySlotsConfig:
            return Memorised(config_class(**settings), options)
        steps = {"refine_steps": 0 if name == "encoder" else REFINE_STEPS}
        return Memorised(str(stack.enter_context(with_settings(self.encoder, {**steps, **settings}))), options)

    def _numbers_of_a_residual_memory(self, model: Any) -> int:
        """What a residual memory stores beside its keys, with the settings given for it."""
        config = MemoryAdapterConfig(**self.settings.get("residual", {}))
        return sum(math.prod(shape) for shape in config.tensor_shapes(find_decoder(model)).values())


def _trained(name: str, settings: Mapping[str, Any], num_parameters: int, progress: bool) -> Baseline:
    recipe = {field: value for field, value in settings.items() if field != "rank"}
    args = {"disable_tqdm": not progress, **recipe.pop("training_args", {})}
    made = replace(TRAINED[name]().recipe, **recipe, training_args=args)
    if name == "full":
        return FineTuned(made)
    return Lora(rank=settings["rank"], recipe=made) if "rank" in settings else Lora(num_parameters, recipe=made)


def _trained_settings(name: str, pairs: Sequence[str]) -> dict[str, Any]:
    """`field=value` pairs as fields of a recipe, or of a LoRA its rank."""
    known: dict[str, tuple[type, ...]] = {field.name: _VALUES[str(field.type)] for field in fields(Recipe)}
    if name == "lora":
        known["rank"] = (int,)
    settings: dict[str, Any] = {}
    for pair in pairs:
        field, _, text = pair.partition("=")
        if field not in known:
            raise wrong("--set", f"{name} has no field `{field}`; it has {', '.join(sorted(known))}.")
        try:
            settings[field] = json.loads(text)
        except ValueError:
            settings[field] = text
        if type(settings[field]) not in known[field]:
            kinds = " or ".join(kind.__name__ for kind in known[field])
            raise wrong("--set", f"`{name}.{field}` must be of the type {kinds}, got {text!r}.")
    return settings
