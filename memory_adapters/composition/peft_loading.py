"""Load PEFT's own adapters from folders that need not be trusted, and refuse to save what could not be loaded.

PEFT does what a config asks: it imports the module that `megatron_core` names, changes the base model, searches module
names with regular expressions of any cost, and allocates the rank that is given before it looks at the weights. Here a
field is used only if its value cannot do more than describe the adapter's tensors, and their names and shapes are
compared with the file before any is allocated.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from memory_adapters.files.names import CONFIG_FILE, PEFT_KEY_PREFIX, WEIGHTS_FILE, is_folder_name
from memory_adapters.files.strict_json import file_in, read_json
from memory_adapters.files.tensors import read_tensors
from memory_adapters.peft_layers.layers import SWITCHED_OFF, adapter_layers, adapter_tensors
from memory_adapters.peft_layers.rollback import rollback_on_error, saved_adapters
from memory_adapters.registry import method_of_type
from memory_adapters.validation import check_name, check_number, shown

__all__ = ["check_saveable", "load_peft_adapter"]

LABELS = ("base_model_name_or_path", "peft_version", "revision", "task_type", "bias")
NAMES = (
    "exclude_modules",
    "feedforward_modules",
    "layers_pattern",
    "modules_to_save",
    "target_modules",
    "target_parameters",
)
SEARCHED = ("layers_pattern", "modules_to_save")  # PEFT searches for each of these names as a regular expression
PATTERNS = ("alpha_pattern", "rank_pattern")
INDICES = ("alora_invocation_tokens", "layers_to_transform", "trainable_token_indices")
INITIALISERS = ("init_lora_weights", "eva_config")  # say how the tensors began; loading replaces them
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
MOST_NAMES = 1 << 16
LONGEST_PATTERN = 1000
_REMEDY = "It could not be loaded again: save it with PEFT's `save_pretrained`, and remove it first."


def load_peft_adapter(base: PreTrainedModel, folder: Path, adapter_name: str) -> None:
    """Load an adapter that PEFT or `save_adapters` saved into a model.

    Args:
        base: A Hugging Face model.
        folder: Has `adapter_config.json` and `adapter_model.safetensors`; nothing else is read.
        adapter_name: Its name on the model.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, its tensors are not those of its config, or its config asks PEFT for more than
            tensors at named modules. The model is unchanged then.
    """
    config_file, weights_file = (file_in(folder, name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    config, initialisers = _read_config(config_file)
    tensors = read_tensors(weights_file, _expected(base, config, adapter_name, f"`{config_file}`"))
    with rollback_on_error(saved_adapters(base)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # there may be other adapters
        warnings.filterwarnings("ignore", message=SWITCHED_OFF)  # `load_adapters` switches them on again
        config.inference_mode = True  # frozen, as PEFT loads adapters
        inject_adapter_in_model(config, base, adapter_name)
        base.__dict__["_hf_peft_config_loaded"] = True  # transformers' set_adapter, disable_adapters and others work
        own = {name.removeprefix(PEFT_KEY_PREFIX): tensor for name, tensor in tensors.items()}
        set_peft_model_state_dict(base, own, adapter_name)  # transformers' load_adapter loads no magnitudes of a DoRA
        loaded = adapter_tensors(base, adapter_name)
        if left := [name for name, tensor in own.items() if not torch.equal(loaded[name], tensor.to(loaded[name]))]:
            raise ValueError(f"`{weights_file}`: PEFT did not load {shown(left)} into this model. Update PEFT.")
        for layer in adapter_layers(base, adapter_name):
            cast(nn.Module, layer).train(base.training)
        for name, value in initialisers.items():
            setattr(base.peft_config[adapter_name], name, value)  # the config is the same when it is saved again


def check_saveable(base: PreTrainedModel, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise a `ValueError` unless `load_peft_adapter` would load the adapter once it is saved.

    Args:
        base: A Hugging Face model.
        adapter_name: An adapter of PEFT's on it.
        tensors: What would be saved, by name in the file.
    """
    if not is_folder_name(adapter_name):
        raise ValueError(f"The adapter {adapter_name!r} cannot be saved in a folder of its name. {_REMEDY}")
    text = json.dumps(cast(PeftConfig, base.peft_config[adapter_name]).to_dict(), default=_plain)
    source = f"The config of {adapter_name!r}"
    config, _ = _checked(json.loads(text), source)
    expected = _expected(base, config, adapter_name, source)
    if no_floats := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{adapter_name!r} has {shown(no_floats)}, which are not floats. {_REMEDY}")
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise ValueError(f"{source} does not give the names and shapes of its tensors. {_REMEDY}")


def _read_config(path: Path) -> tuple[PeftConfig, dict[str, Any]]:
    return _checked(read_json(path), f"`{path}`")


def _checked(values: Any, source: str) -> tuple[PeftConfig, dict[str, Any]]:
    """Return the config with these values, but for the initialisers, and those apart."""
    kind = values.get("peft_type") if isinstance(values, dict) else None
    types: Mapping[Any, type[PeftConfig]] = PEFT_TYPE_TO_CONFIG_MAPPING  # its keys are strings too
    found = types.get(kind) if isinstance(kind, str) and method_of_type(kind) is None else None
    if found is None:
        raise ValueError(f"{source} has `peft_type={shown(kind)}`, which is not one of PEFT's. Save it again.")
    values.pop("auto_mapping", None)  # names a library that PEFT would import
    default = found()
    known = {field.name for field in fields(found)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"{source} has fields {shown(unknown)}, which this version of PEFT does not have: update PEFT."
        )
    try:
        given = {name: value for name, value in values.items() if value not in (None, _plain(getattr(default, name)))}
        for name, value in given.items():
            _check_field(name, value)
        initialisers = {name: given.pop(name) for name in INITIALISERS if name in given}
        if initialisers:
            given["init_lora_weights"] = False
        return found(**given), initialisers
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} cannot be used: {error}") from error


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    value = sorted(value) if isinstance(value, set) else value
    return getattr(value, "value", value)


def _check_field(name: str, value: Any) -> None:  # noqa: C901  # a list of kinds of fields
    """Raise a `ValueError` unless this field, different from its default, only describes tensors."""
    if name in LABELS or name == "peft_type":
        check_name(name, value)
    elif name in NAMES:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or len(listed) > MOST_NAMES or not all(isinstance(n, str) for n in listed):
            raise ValueError(f"`{name}` must be a list of module names, got {shown(value)}.")
        if isinstance(value, str) or name in SEARCHED:
            _check_patterns(name, listed)
    elif name in PATTERNS and isinstance(value, dict):
        _check_patterns(name, value)
        for number in value.values():
            check_number(name, number, low=0)
    elif name in INDICES:
        listed = chain.from_iterable(value.values()) if isinstance(value, dict) else value
        for index in listed if isinstance(listed, list | chain) else [listed]:
            check_number(name, index, low=0, integer=True)
    elif name in INITIALISERS:
        if isinstance(value, str) and value.lower().startswith(CHANGES_BASE):
            raise ValueError(
                f"`{name}={shown(value)}` changed the weights of the base model, which are not saved with the adapter: "
                "merge it with `merge_lora`, or convert it with PEFT's `save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...)`."
            )
    elif name == "layer_replication":
        raise ValueError(
            f"`{name}={shown(value)}` adds layers to the base model, which are not saved with the adapter: repeat the "
            "layers in the base model itself, save that, and give it a LoRA without `layer_replication`."
        )
    elif value != "gaussian" and type(value) is not bool:
        if isinstance(value, str | list | dict):
            raise ValueError(
                f"`{name}={shown(value)}` may make PEFT import, open or build something: if you trust this adapter, "
                "save and load it with PEFT's `save_pretrained` and `load_adapter`."
            )
        check_number(name, value, low=float("-inf"))


def _check_patterns(name: str, patterns: Iterable[str]) -> None:
    """Raise a `ValueError` if searching for one of these regular expressions in a module's name could take long."""
    for count, pattern in enumerate(patterns):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"`{name}={shown(pattern)}` is not a regular expression ({error}).") from error
        repeats = len(re.findall(r"[*+{]", pattern))
        if count >= LONGEST_PATTERN or len(pattern) > LONGEST_PATTERN or repeats > 3 or re.search(r"\)[*+{]", pattern):
            raise ValueError(
                f"`{name}={shown(pattern)}` could take very long to search for: name the modules in a list instead."
            )


def _expected(base: PreTrainedModel, config: PeftConfig, adapter_name: str, source: str) -> dict[str, torch.Size]:
    """Return name in the file and shape of each of the adapter's tensors, without allocating any."""
    try:
        with torch.device("meta"):
            skeleton = type(base)(copy.deepcopy(base.config))
            inject_adapter_in_model(copy.deepcopy(config), skeleton, adapter_name)
    except (ValueError, TypeError, RuntimeError, OverflowError, NotImplementedError) as error:
        raise ValueError(f"{source} does not fit this model: {error}") from error
    return {PEFT_KEY_PREFIX + name: t.shape for name, t in adapter_tensors(skeleton, adapter_name).items()}
