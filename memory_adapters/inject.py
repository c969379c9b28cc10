"""Put a memory on a model: a fresh one, or one from a folder or the Hub."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import Decoder, base_model, check_not_sharded, find_decoder, unwrapped
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.fingerprint import (
    Fingerprint,
    base_fingerprint,
    check_fingerprint,
    tokenizer_fingerprint,
    tokenizer_habits,
    warn_if_unmarked,
)
from memory_adapters.base_model.modes import own_settings
from memory_adapters.base_model.seeding import seeded
from memory_adapters.base_model.trial import check_stream, is_runnable
from memory_adapters.config import CHECKED, MemoryConfig
from memory_adapters.files.atomic import read_lock
from memory_adapters.files.hub import find_files
from memory_adapters.files.names import CARD_FILE, CONFIG_FILE, CONFIG_FILES, is_folder_name
from memory_adapters.files.strict_json import SAVE_AGAIN, file_in, read_json
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.attached import ATTACHED, Attached
from memory_adapters.peft_layers.layers import (
    SWITCHED_OFF,
    MemoryLayer,
    adapter_layers,
    key_parts,
    saved_activation,
    whole_copies,
)
from memory_adapters.peft_layers.rollback import rollback_on_error, saved_adapters
from memory_adapters.peft_layers.virtual_tokens import virtual_tokens_disabled
from memory_adapters.registry import Method, method_of, method_of_type, methods
from memory_adapters.validation import shown

__all__ = ["inject_memory", "load_memory", "memories", "read_config"]

_DEFAULT_NAME = "knowledge"
BASE_ROW = "__base__"


def inject_memory(
    model: PreTrainedModel | PeftModel,
    config: MemoryConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter_name: str | None = None,
) -> Memory[Any]:
    """Add a fresh memory to a model, which behaves exactly as before until something is written.

    The base is frozen, as PEFT does; adapters that are active stay active. The config is copied.

    Args:
        model: A Hugging Face causal LM, or a PeftModel around one.
        config: Which method, and its settings.
        tokenizer: The model's tokenizer, or a processor that has one; needed to write.
        adapter_name: Name among the model's adapters; by default `"knowledge"`, or with a number if that is taken.

    Raises:
        TypeError: If `config` is of no memory method, or `model` or `tokenizer` is none.
        ValueError: If the name is taken or unusable, the model is sharded or of unknown structure, a layer is out of
            range, the tokenizer does not fit the model, or a few tokens that are tried do not pass through the model as
            the method needs it. The model is unchanged then.
        RuntimeError: If another thread uses the model.
    """
    method = method_of(config)
    if method is None:
        known = ", ".join(sorted(one.config_class.__name__ for one in methods().values()))
        if isinstance(config, type) and issubclass(config, MemoryConfig):
            raise TypeError(f"`config` is the class {config.__name__}; give a config, such as `{config.__name__}()`.")
        raise TypeError(f"`config` is a {type(config).__name__}; give one of {known}.")
    base = base_model(model)
    with exclusive_use(base), own_settings():
        check_not_sharded(base)
        decoder = find_decoder(base, config.layers_path)
        fingerprint = base_fingerprint(base, decoder=decoder)
        return _inject(model, method, copy.deepcopy(config), tokenizer, adapter_name, decoder, fingerprint)


def load_memory(
    model: PreTrainedModel | PeftModel,
    path_or_repo_id: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter_name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Memory[Any]:
    """Load a saved memory of any method into a model; the files say which method it is.

    Args:
        model: The base model that the memory was written with, in any precision, or a PeftModel around it.
        path_or_repo_id: A folder, or a repository on the Hub.
        tokenizer: The model's tokenizer; needed to write more.
        adapter_name: Name among the model's adapters; by default `"knowledge"`, or with a number if that is taken.
        revision: Branch, tag or commit on the Hub.
        token: Access token for the Hub.
        subfolder: Folder of the memory inside the folder or repository, such as a name that `save_adapters` saved.
        cache_dir: Where downloaded files are kept; by default the Hub's cache.
        local_files_only: Whether to use the cache alone, without the network.

    Raises:
        FileNotFoundError: If there is no such folder, or a file is missing in it.
        OSError: What huggingface_hub raises if the repository or revision cannot be downloaded.
        ValueError: If a file is damaged, the memory belongs to another base model or tokenizer, or as `inject_memory`.
            The model is unchanged then.
        RuntimeError: If another thread uses the model.
    """
    base = base_model(model)
    folder = find_files(
        path_or_repo_id,
        revision=revision,
        token=token,
        subfolder=subfolder,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    with read_lock(folder):
        method, config = _read_method(folder)
        check_not_sharded(base)
        decoder = find_decoder(base, config.layers_path)
        fingerprint = base_fingerprint(base, decoder=decoder)
        warn_if_unmarked(config.base_fingerprint, "This memory")
        check_fingerprint(config.base_fingerprint or {}, fingerprint)
        resolved = copy.deepcopy(config)
        resolved.resolve(decoder)
        contents = method.memory_class._read_files(folder, resolved, decoder)
    with exclusive_use(base), own_settings():
        memory = _inject(model, method, config, tokenizer, adapter_name, decoder, fingerprint)
        with rollback_on_error(memory.remove):
            memory._restore(contents)
            _warn_of_duplicates(base, memory.adapter_name)
        return memory


def _read_method(folder: Path) -> tuple[Method, MemoryConfig]:
    """Return method and config of a saved memory, all of whose files are there, or of which PEFT saved the adapter."""
    config_file = next((name for name in CONFIG_FILES if (folder / name).is_file()), CONFIG_FILE)
    if config_file == CONFIG_FILE:
        for known in methods().values():
            adopted = known.memory_class._config_of_adapter(file_in(folder, CONFIG_FILE))
            if adopted is not None:
                return known, adopted
    config = read_config(file_in(folder, config_file))
    method = method_of(config)
    assert method is not None
    for file in method.memory_class.files:
        if file != CARD_FILE:
            file_in(folder, file)
    return method, config


def _inject(
    model: PreTrainedModel | PeftModel,
    method: Method,
    config: MemoryConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    adapter_name: str | None,
    decoder: Decoder,
    fingerprint: Fingerprint,
) -> Memory[Any]:
    """Do as `inject_memory`, with a config that may be changed and what is known of the base model."""
    base = base_model(model)
    own = dict(fingerprint)
    if tokenizer is not None:
        tokenizer = _checked_tokenizer(tokenizer, decoder.vocab_size)
        own |= {"tokenizer": tokenizer_fingerprint(tokenizer), **tokenizer_habits(tokenizer)}
    if config.base_fingerprint is None:
        config.base_fingerprint = own
    check_fingerprint(config.base_fingerprint, own)
    runnable = is_runnable(decoder)
    if runnable:
        with virtual_tokens_disabled(base):
            check_stream(decoder)
    config.resolve(decoder)
    name = _free_name(base) if adapter_name is None else _checked_name(base, adapter_name)
    if config.base_model_name_or_path is None:
        path = getattr(base, "name_or_path", None) or None
        config.base_model_name_or_path = os.path.abspath(path) if path and os.path.isdir(path) else path

    attached: Attached = getattr(base, ATTACHED, None) or Attached()
    if not getattr(base, "peft_config", None):
        attached = Attached({}, [name for name, parameter in base.named_parameters() if parameter.requires_grad])
    active = [(layer, list(layer.active_adapters)) for layer in (*adapter_layers(base), *whole_copies(base))]
    with rollback_on_error(saved_adapters(base)):
        adapter_config = config.adapter_config(decoder)
        if adapter_config is None:
            own_configs: dict[str, Any] = {**getattr(base, "peft_config", {}), name: config}
            base.peft_config = own_configs
            base.requires_grad_(False)
        else:
            _inject_peft(base, adapter_config, name, getattr(config, "seed", 0))
        if hasattr(base, "add_adapter") and not isinstance(model, PeftModel):
            # transformers' set_adapter, disable_adapters and active_adapters work then
            base.__dict__["_hf_peft_config_loaded"] = True
        injected = base.peft_config[name]
        own_config = injected if isinstance(injected, MemoryConfig) else config
        memory: Memory[Any] = method.memory_class(base, name, own_config, tokenizer)
        memory._attach(decoder)
        if runnable:
            every = adapter_layers(base)
            with saved_activation(every):
                for layer in every:
                    layer._active_adapter = []
                memory.active = True
                memory._try_model(decoder)
        for layer, names in active:
            layer._active_adapter = names
        memory.active = True
    setattr(base, ATTACHED, Attached({**attached.memories, name: memory}, attached.trainable))
    return memory


def _inject_peft(base: PreTrainedModel, config: PeftConfig, name: str, seed: int) -> None:
    """Let PEFT inject an adapter; raise a `ValueError` unless it is at the places that the config names alone."""
    targets = set(getattr(config, "target_modules", None) or ())
    with warnings.catch_warnings(), ExitStack() as stack:
        # PEFT warns of a second adapter, which is what is wanted here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", message=SWITCHED_OFF)  # the caller switches them on again
        for module in [module for path, module in base.named_modules() if path in targets]:
            stack.enter_context(align_module_device(unwrapped(module)))  # offloaded: else the adapter has no data
        stack.enter_context(seeded(seed))  # a LoRA starts from random numbers
        stack.enter_context(_targets_as_given(config, base))
        vars(config)[CHECKED] = id(base)
        stack.callback(vars(config).pop, CHECKED)
        inject_adapter_in_model(config, base, adapter_name=name)
    placed = {path: layer for path, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    found = {
        path.rpartition(".")[0] if isinstance(layer, MemoryLayer) else path.removesuffix(".base_layer")
        for path, layer in placed.items()
        if name in layer._get_available_adapters()
    }
    if found != targets:
        raise ValueError(
            f"PEFT put the adapter on {shown(sorted(found))} of {type(base).__name__}, and {shown(sorted(targets))} "
            "was asked for: choose other `layers` or `target_modules`, or use MemoryAdapterConfig."
        )


@contextmanager
def _targets_as_given(config: PeftConfig, base: PreTrainedModel) -> Iterator[None]:
    """Keep PEFT, within this context, from rewriting a LoRA's targets.

    For mixtures of experts it turns every `down_proj` into the parameters of the experts, so that adapters trained with
    transformers 4 still load: also that of a dense block. It knows such models by their type.
    """
    own = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(own, model=base, conversions=None)
        rewritten = set(own.target_modules or ()) != set(config.target_modules or ())  # type: ignore[attr-defined]
    except ValueError:  # it would have to take some, and not others, of what is one parameter now
        rewritten = True
    if not rewritten:
        yield
        return
    attributes = vars(base.config)
    before = {key: value for key, value in attributes.items() if key == "model_type"}
    attributes["model_type"] = f"{base.config.model_type}, targets as given"
    try:
        yield
    finally:
        attributes.pop("model_type")
        attributes.update(before)


def memories(model: PreTrainedModel | PeftModel) -> dict[str, Memory[Any]]:
    """Return the memories on a model by adapter name, in the order they came, however they were put there.

    A memory that PEFT injected (`get_peft_model`, `add_adapter`) is returned as a new object by each call.
    """
    base = base_model(model)
    attached: Attached = getattr(base, ATTACHED, None) or Attached()
    found = {name: memory for name, memory in attached.memories.items() if memory.attached}
    for name, config in getattr(base, "peft_config", {}).items():
        method = method_of(config)
        if name not in found and method is not None:
            found[name] = method.memory_class(base, name, config)
    order = list(getattr(base, "peft_config", {}))
    return dict(sorted(found.items(), key=lambda entry: order.index(entry[0]) if entry[0] in order else -1))


def _warn_of_duplicates(base: PreTrainedModel, adapter_name: str) -> None:
    """Warn if another memory on the model has the very tensors of this one, and some numbers in each."""
    held: dict[str, dict[str, torch.Tensor]] = {name: {} for name in memories(base)}
    for path, tensor in chain(base.named_parameters(), base.named_buffers()):
        parts = path.split(".")
        for name in held.keys() & set(parts):
            held[name][".".join(part for part in parts if part != name)] = tensor
    own = held.pop(adapter_name)
    for name, other in held.items():
        alike = own.keys() == other.keys() and all(t.numel() and torch.equal(t, other[key]) for key, t in own.items())
        if own and alike:
            warnings.warn(
                f"{adapter_name!r} duplicates {name!r}, already on this model; if both are active the memory is "
                "applied twice. Remove one of them.",
                stacklevel=3,
            )


def _free_name(model: PreTrainedModel) -> str:
    taken = set(getattr(model, "peft_config", {}))
    number, name = 1, _DEFAULT_NAME
    while name in taken:
        number += 1
        name = f"{_DEFAULT_NAME}_{number}"
    return name


def _checked_name(model: PreTrainedModel, name: str) -> str:
    taken = getattr(model, "peft_config", {})
    if not isinstance(name, str):
        raise ValueError(f"`adapter_name={shown(name)}` must be a string.")
    if name in taken:
        raise ValueError(f"`adapter_name={name!r}` is taken on this model (adapters: {sorted(taken)}); choose another.")
    parts = {part for module, _ in model.named_modules() for part in module.split(".")}
    parts |= {part for parameter, _ in model.named_parameters() for part in parameter.split(".")}
    if isinstance(name, str) and hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"`adapter_name={shown(name)}` cannot be used: torch's modules have an attribute of that name."
        )
    if not isinstance(name, str) or not name or "." in name or name in parts | key_parts() or name == BASE_ROW:
        raise ValueError(
            f"`adapter_name={name!r}` cannot be used: it must be non-empty, without dots, and no module's name "
            "(the name becomes part of the model's state dict keys)."
        )
    if not is_folder_name(name):
        raise ValueError(
            f"`adapter_name={shown(name)}` cannot be used: `save_adapters` saves each adapter in a folder of its name, "
            "so it must be printable, without slashes or spaces at its ends, and at most 255 bytes long."
        )
    return name


def _checked_tokenizer(tokenizer: Any, size: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer, or a processor's own, if it fits a model of `size` embeddings."""
    own: Any = tokenizer if hasattr(tokenizer, "get_vocab") else getattr(tokenizer, "tokenizer", None)
    if not hasattr(own, "get_vocab"):
        load = f"AutoTokenizer.from_pretrained({tokenizer!r})" if isinstance(tokenizer, str) else "the model's own"
        raise TypeError(f"`tokenizer` is a {type(tokenizer).__name__}; give the tokenizer itself: {load}.")
    template = getattr(tokenizer, "chat_template", None)
    if own is not tokenizer and template and not getattr(own, "chat_template", None):
        own = copy.copy(own)
        own.chat_template = template
    highest = max(own.get_vocab().values())
    if highest >= size:
        raise ValueError(
            f"`tokenizer` does not belong to this model: it makes ids up to {highest}, the model has {size} "
            "embeddings. Load the model's own tokenizer (or resize the model's embeddings first)."
        )
    return cast(PreTrainedTokenizerBase, own)


def read_config(path: str | os.PathLike[str]) -> MemoryConfig:
    """Return the config of a saved memory.

    Raises:
        ValueError: If the file is damaged, or of no memory method.
    """
    values = read_json(path)
    kind = values.get("peft_type") if isinstance(values, dict) else None
    method = method_of_type(kind)
    if method is None:
        own = isinstance(kind, str) and kind in PEFT_TYPE_TO_CONFIG_MAPPING
        remedy = "Load it with PEFT (`model.load_adapter(...)`)." if own else SAVE_AGAIN
        raise ValueError(f"`{path}` has `peft_type={shown(kind)}`, which is no memory method. {remedy}")
    values.pop("auto_mapping", None)  # names a library that PEFT would import
    try:
        return method.config_class.from_peft_type(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{path}` does not hold a config that can be used: {error}") from error
