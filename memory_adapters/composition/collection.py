"""Save all adapters of a model in one folder, memories and PEFT's own, also at every checkpoint, and load them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from memory_adapters.base_model.decoder import base_model
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.composition.peft_loading import check_saveable, load_peft_adapter
from memory_adapters.files.atomic import atomic_directory, read_lock
from memory_adapters.files.hub import find_adapters
from memory_adapters.files.names import PEFT_KEY_PREFIX, WEIGHTS_FILE, is_folder_name
from memory_adapters.files.strict_json import file_in, read_json
from memory_adapters.files.tensors import write_tensors
from memory_adapters.inject import load_memory, memories
from memory_adapters.memory import Memory, replace_memory
from memory_adapters.peft_layers.attached import saved_memories
from memory_adapters.peft_layers.layers import adapter_layers, adapter_tensors, whole_copies
from memory_adapters.peft_layers.rollback import rollback_on_error, saved_adapters
from memory_adapters.training.distributed import is_main_process

__all__ = ["SaveAdaptersCallback", "load_adapters", "save_adapters"]

INDEX_FILE = "adapters.json"
BASE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json")


def save_adapters(model: PreTrainedModel | PeftModel, folder: str | os.PathLike[str]) -> None:
    """Save every adapter of a model, each in a subfolder of its name.

    A subfolder can be loaded on its own, by `load_memory` or by PEFT. An index has the names in their order, and says
    which are active.

    Args:
        model: A model with adapters, or a PeftModel around one.
        folder: All adapters in it are replaced together or not at all.

    Raises:
        ValueError: If the model has no adapter, or one that could not be loaded again. Nothing is written then.
    """
    base = base_model(model)
    known = memories(base)
    configs: dict[str, PeftConfig] = dict(getattr(base, "peft_config", {}))
    if not configs:
        raise ValueError("`model` has no adapter to save: inject a memory or add a LoRA first.")
    index = [{"name": n, "memory": n in known, "active": _is_active(base, n, known)} for n in configs]
    pefts = {}
    for name in [name for name in configs if name not in known]:
        pefts[name] = {PEFT_KEY_PREFIX + key: tensor for key, tensor in adapter_tensors(base, name).items()}
        check_saveable(base, name, pefts[name])
    with atomic_directory(folder) as staging:
        for name, config in configs.items():
            own = staging / name
            if name in known:
                known[name].save_pretrained(own)
            else:
                own.mkdir()
                write_tensors(own / WEIGHTS_FILE, pefts[name])
                config.save_pretrained(str(own))
            replace_memory(own, Path(folder) / name)
        (staging / INDEX_FILE).write_text(json.dumps({"adapters": index}, indent=2) + "\n", encoding="utf-8")


def load_adapters(
    model: PreTrainedModel | PeftModel,
    path_or_repo_id: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    token: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> dict[str, Memory[Any]]:
    """Load all adapters that `save_adapters` saved, in the same order, with the same ones active.

    Args:
        model: The base model.
        path_or_repo_id: A folder written by `save_adapters`, or a repository on the Hub with its files.
        tokenizer: The model's tokenizer; needed to write more.
        revision: Branch, tag or commit on the Hub.
        token: Access token for the Hub.
        subfolder: Where the files are in that folder or repository.
        cache_dir: Where downloads are kept; by default the Hub's cache.
        local_files_only: Whether to use only what was downloaded before.

    Returns:
        The memories among them, by name.

    Raises:
        FileNotFoundError: If there is no such folder, or it has no index of adapters.
        OSError: What huggingface_hub raises if the repository or revision is not available.
        ValueError: As `load_memory`. Adapters that were loaded before the error are removed again.
    """
    hub: dict[str, Any] = dict(token=token, subfolder=subfolder, cache_dir=cache_dir, local_files_only=local_files_only)
    folder = find_adapters(path_or_repo_id, INDEX_FILE, _folders, revision=revision, **hub)
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"`{folder}` has no {INDEX_FILE}: give a folder written by `save_adapters`.")
    base = base_model(model)
    with read_lock(folder), exclusive_use(base), rollback_on_error(saved_adapters(base), saved_memories(base)):
        return _load(base, folder, _read_index(file_in(folder, INDEX_FILE)), tokenizer)


def _folders(index_file: Path) -> list[str]:
    return [name for name, _, _ in _read_index(index_file)]


def _load(
    base: PreTrainedModel, folder: Path, index: list[tuple[str, bool, bool]], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Memory[Any]]:
    before = {id(layer): list(layer.active_adapters) for layer in (*adapter_layers(base), *whole_copies(base))}
    for name, is_memory, _ in index:
        if is_memory:
            load_memory(base, folder / name, tokenizer=tokenizer, adapter_name=name)
        else:
            load_peft_adapter(base, folder / name, name)
    for layer in (*adapter_layers(base), *whole_copies(base)):
        layer._active_adapter = before.get(id(layer), [])
    found = memories(base)
    for name, _, active in index:
        if active and name in found:
            found[name].active = True
        elif active:
            copies = [copy for copy in whole_copies(base) if name in copy._get_available_adapters()]
            for layer in (*adapter_layers(base, name), *copies):
                layer._active_adapter = [*layer.active_adapters, name]
    return {name: found[name] for name, _, _ in index if name in found}


class SaveAdaptersCallback(TrainerCallback):
    """Save all adapters of the model under `adapters/` in every checkpoint of Trainer, and no base weights.

    Trainer itself saves what PEFT knows of a PeftModel; here memories come with all of their files (the ledger of an
    edit, slots), ready for `load_adapters`. When Trainer resumes, it makes the LoRA the only active one of its kind,
    which silences edits; the adapters that were active when the Trainer was made are active again.
    """

    def __init__(self) -> None:
        self.active: list[tuple[BaseTunerLayer, list[str]]] = []

    def on_init_end(  # type: ignore[override]  # Trainer always gives the model
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | PeftModel,
        **kwargs: Any,
    ) -> None:
        """Note, when the Trainer is made, which adapters are active."""
        self.active = [(layer, list(layer.active_adapters)) for layer in adapter_layers(model)]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Activate them again, after a checkpoint was loaded and before the first step."""
        for layer, names in self.active:
            layer._active_adapter = list(names)

    def on_save(  # type: ignore[override]  # as above
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | PeftModel,
        **kwargs: Any,
    ) -> None:
        """Save the adapters into a checkpoint that Trainer wrote, and delete the base weights in it."""
        assert args.output_dir is not None  # `TrainingArguments` filled it in
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if is_main_process():
            save_adapters(model, checkpoint / "adapters")
            for pattern in BASE_WEIGHTS:
                for file in checkpoint.glob(pattern):
                    file.unlink()


def _read_index(path: Path) -> list[tuple[str, bool, bool]]:
    try:
        index = [(entry["name"], entry["memory"], entry["active"]) for entry in read_json(path)["adapters"]]
        names = [name for name, _, _ in index]
        if not all(map(is_folder_name, names)) or len(set(names)) < len(names):
            raise ValueError("names must be those of single folders, each once")
        if any({type(memory), type(active)} != {bool} for _, memory, active in index):
            raise ValueError("`memory` and `active` must be true or false")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`{path}` is damaged ({error}). Save the adapters again.") from error
    for name in names:
        if (path.parent / name).resolve().parent != path.parent.resolve():
            raise ValueError(f"`{path.parent / name}` leads out of its folder: put a copy of what it links to there.")
    return index


def _is_active(base: PreTrainedModel, name: str, known: dict[str, Memory[Any]]) -> bool:
    if name in known:
        return known[name].active
    return any(name in layer.active_adapters for layer in adapter_layers(base, name))
