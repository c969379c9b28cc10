"""Adapters of PEFT's own from a folder that need not be trusted: settings that only say what matrices there are.

PEFT does what a config asks: it imports the module that `megatron_core` names, searches module names with regular
expressions of any cost, and allocates the rank that is named before it looks at the weights.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, inject_adapter_in_model

from memory_adapters.files.names import CONFIG_FILE, PEFT_KEY_PREFIX, WEIGHTS_FILE
from memory_adapters.files.strict_json import file_in, read_json
from memory_adapters.files.tensors import read_tensors
from memory_adapters.peft_layers.layers import adapter_tensors
from memory_adapters.peft_layers.rollback import rollback_on_error, saved_adapters
from memory_adapters.registry import method_of_type
from memory_adapters.validation import check_name, check_number, shown

__all__ = ["load_peft_adapter"]

LABELS = ("base_model_name_or_path", "peft_version", "revision", "task_type", "bias")
NAMES = ("exclude_modules", "feedforward_modules", "layers_pattern", "modules_to_save", "target_modules")
PATTERNS = ("alpha_pattern", "rank_pattern")
MOST_NAMES = 1 << 16
LONGEST_PATTERN = 1000


def load_peft_adapter(base: Any, folder: Path, adapter_name: str) -> None:
    """Put an adapter that PEFT or `save_adapters` saved on a model.

    Args:
        base: A Hugging Face model.
        folder: With `adapter_config.json` and `adapter_model.safetensors`; nothing else is read.
        adapter_name: Its name on the model.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, its tensors are not those of its config, or its config asks for more than
            matrices at named modules. The model is unchanged then.
    """
    config_file, weights_file = (file_in(folder, name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    config = _read_config(config_file)
    tensors = read_tensors(weights_file, _expected(base, config, adapter_name, config_file))
    with (
        rollback_on_error(saved_adapters(base)),
        warnings.catch_warnings(),
    ):  # PEFT warns of a second adapter; that is the point here
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        base.load_adapter(adapter_name=adapter_name, peft_config=config, adapter_state_dict=tensors)


def _read_config(path: Path) -> PeftConfig:
    values = read_json(path)
    kind = values.get("peft_type") if isinstance(values, dict) else None
    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) and method_of_type(kind) is None else None
    if found is None:
        raise ValueError(f"`{path}` has `peft_type={shown(kind)}`, which is no adapter of PEFT's. Save it again.")
    values.pop("auto_mapping", None)
    default = found()
    known = {field.name for field in fields(found)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"`{path}` has fields {shown(unknown)}, which this version of PEFT has not: update PEFT.")
    try:
        asked = {name: value for name, value in values.items() if _plain(value) != _plain(getattr(default, name))}
        for name, value in asked.items():
            _check_field(name, value)
        return found(**asked)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{path}` does not hold a config that can be used: {error}") from error


def _plain(value: Any) -> Any:
    """As JSON has it."""
    value = sorted(value) if isinstance(value, set) else value
    return getattr(value, "value", value) or None


def _check_field(name: str, value: Any) -> None:
    """Raise a `ValueError` unless this field, different from its default, is one that only describes matrices."""
    if name in LABELS or name == "peft_type":
        check_name(name, value)
    elif name in NAMES:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or len(listed) > MOST_NAMES or not all(isinstance(n, str) for n in listed):
            raise ValueError(f"`{name}` must be a list of module names, got {shown(value)}.")
        if isinstance(value, str) or name == "layers_pattern":
            _check_patterns(name, listed)
    elif name in PATTERNS and isinstance(value, dict):
        _check_patterns(name, value)
        for number in value.values():
            check_number(name, number, low=0)
    elif name == "layers_to_transform":
        for layer in value if isinstance(value, list) else [value]:
            check_number(name, layer, low=0, integer=True)
    elif value not in (None, "gaussian") and type(value) is not bool:
        if isinstance(value, str | list | dict):
            raise ValueError(
                f"`{name}={shown(value)}` makes PEFT do more than hold matrices: if you trust this adapter, load it "
                "with `model.load_adapter`."
            )
        check_number(name, value, low=float("-inf"))


def _check_patterns(name: str, patterns: Iterable[str]) -> None:
    """Raise a `ValueError` unless no search for these regular expressions in a module's name can take long."""
    for count, pattern in enumerate(patterns):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"`{name}={shown(pattern)}` is no regular expression ({error}).") from error
        repeats = len(re.findall(r"[*+{]", pattern))
        if count >= LONGEST_PATTERN or len(pattern) > LONGEST_PATTERN or repeats > 3 or re.search(r"\)[*+{]", pattern):
            raise ValueError(
                f"`{name}={shown(pattern)}` could take very long to search for: name the modules in a list instead."
            )


def _expected(base: Any, config: PeftConfig, adapter_name: str, path: Path) -> dict[str, torch.Size]:
    """Name in the file and shape of each of the adapter's tensors, found without allocating any."""
    try:
        with torch.device("meta"):
            skeleton = type(base)(copy.deepcopy(base.config))
            inject_adapter_in_model(copy.deepcopy(config), skeleton, adapter_name)
    except (ValueError, TypeError, RuntimeError, OverflowError, NotImplementedError) as error:
        raise ValueError(f"`{path}` does not fit this model: {error}") from error
    return {PEFT_KEY_PREFIX + name: t.shape for name, t in adapter_tensors(skeleton, adapter_name).items()}
