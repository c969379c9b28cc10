"""The interface every memory method implements."""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from memory_adapters.base_model.decoder import Decoder, check_not_sharded
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.fingerprint import base_fingerprint
from memory_adapters.config import MemoryConfig
from memory_adapters.files.atomic import atomic_directory, replacing
from memory_adapters.files.hub import OnHub
from memory_adapters.files.model_card import CARD_FILE, model_card
from memory_adapters.files.tensors import read_tensors, write_tensors
from memory_adapters.peft_layers.layers import adapter_layers, adapter_tensors, set_adapter_tensors
from memory_adapters.peft_layers.rollback import rollback_on_error
from memory_adapters.registry import saved_file_names
from memory_adapters.report import WriteReport

if TYPE_CHECKING:
    from memory_adapters.export import Exporter

from memory_adapters.files.names import CONFIG_FILE, PEFT_KEY_PREFIX, WEIGHTS_FILE

__all__ = ["Memory", "WriteReport"]


@dataclass
class Attached:
    """What `inject_memory` keeps on a model: its memories, and which base parameters were trainable before them."""

    memories: dict[str, Memory] = field(default_factory=dict)
    trainable: list[str] = field(default_factory=list)


ATTACHED = "_memory_adapters"


def forget_adapter(model: Any, adapter_name: str) -> None:
    """Take an adapter whose modules are gone out of the model's books; after the last one nothing is left in them."""
    del model.peft_config[adapter_name]
    attached: Attached | None = getattr(model, ATTACHED, None)
    if attached is not None:
        left = {name: memory for name, memory in attached.memories.items() if name != adapter_name}
        setattr(model, ATTACHED, Attached(left, attached.trainable))
        if not left:
            parameters = dict(model.named_parameters())
            for name in attached.trainable:
                if name in parameters:
                    parameters[name].requires_grad_(True)
            delattr(model, ATTACHED)
    if not model.peft_config:
        del model.peft_config
        model.__dict__.pop("_hf_peft_config_loaded", None)


def replace_memory(staging: Path, folder: Path) -> None:
    """Of a memory saved in `folder`, let files go that the one saved in `staging` does not have."""
    if (folder / CONFIG_FILE).is_file():
        replacing(staging, folder, saved_file_names())


class Memory(OnHub):
    """Knowledge that can be written into one model, switched off, taken out, saved and loaded.

    Made by `inject_memory` and `load_memory`, not directly.

    Attributes:
        model: The Hugging Face model it sits in (inside a PeftModel, the base).
        config: Its config, with layers resolved.
        adapter_name: Its name on the model.
        tokenizer: The model's tokenizer, needed to write.
    """

    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
    optional_files: ClassVar[tuple[str, ...]] = ()
    exporters: ClassVar[Mapping[str, Exporter]] = {}  # by format, for `export`
    export_note: ClassVar[str] = ""  # what to do without a format

    def __init__(self, model: Any, adapter_name: str, config: MemoryConfig, tokenizer: Any = None) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self.tokenizer = tokenizer
        self._config = config
        self._adapter_config: PeftConfig = self.model.peft_config[adapter_name]

    @property
    def config(self) -> MemoryConfig:
        self._check_attached()
        return self._config

    @abstractmethod
    def write(self, items: Any) -> WriteReport:
        """Learn `items` (one or many; a plain string is a `Document`)."""

    @abstractmethod
    def _detach(self) -> None:
        """Take this memory's modules and hooks off the model."""

    @property
    def attached(self) -> bool:
        """Whether the memory is still on its model.

        PEFT's `merge_and_unload` and `unload` of another adapter drop the configs of all: a memory whose modules they
        left in place is entered again, as one of the model as it is now.
        """
        configs: dict[str, Any] = getattr(self.model, "peft_config", {})
        if self.adapter_name not in configs and self._in_place():
            self.model.peft_config = {**configs, self.adapter_name: self._adapter_config}
            self._rebase(base_fingerprint(self.model, self._config.layers_path))
        return getattr(self.model, "peft_config", {}).get(self.adapter_name) is self._adapter_config

    def _in_place(self) -> bool:
        """Whether all of this memory's modules are on the model, whatever the model's books say."""
        return bool(self.tuner_layers())

    def _rebase(self, fingerprint: dict[str, Any]) -> None:
        """Belong to the model as it is now."""
        self._config.base_fingerprint = {**(self._config.base_fingerprint or {}), **fingerprint}

    def _rollback_on_error(self) -> AbstractContextManager[None]:
        """If the block fails or is interrupted, the model and this memory are what they were before."""
        return rollback_on_error(self.model, self, self._config, self._adapter_config, tensors=self._trained())

    def _trained(self) -> Iterable[torch.Tensor]:
        """Tensors of the memory that a write changes in place."""
        return ()

    def _check_attached(self) -> None:
        if not self.attached:
            raise RuntimeError(f"The memory {self.adapter_name!r} was removed from its model; inject or load it again.")

    def _check_writable(self) -> None:
        self._check_attached()
        check_not_sharded(self.model)
        if self.tokenizer is None:
            raise ValueError("Writing needs the model's tokenizer: inject or load with `tokenizer=...`.")
        own = self._config.base_fingerprint or {}
        for name, value in base_fingerprint(self.model, self._config.layers_path).items():
            if value is not None and own.get(name) not in (None, value):
                raise ValueError(
                    f"The base model is not what it was when {self.adapter_name!r} came to it: its `{name}` was "
                    f"{own[name]}, and is {value} now. Undo the change (such as with `unmerge_adapter()`), or inject "
                    "a new memory."
                )

    def tuner_layers(self) -> list[BaseTunerLayer]:
        """PEFT layers that hold this memory, lowest block first."""
        return adapter_layers(self.model, self.adapter_name)

    @property
    def active(self) -> bool:
        """Whether the memory takes part in forward passes. Assign to switch it; others are not touched."""
        self._check_attached()
        layers = self.tuner_layers()
        return bool(layers) and all(self.adapter_name in x.active_adapters and not x.disable_adapters for x in layers)

    @active.setter
    def active(self, value: bool) -> None:
        self._check_attached()
        with exclusive_use(self.model):
            layers = self.tuner_layers()
            others = [[name for name in layer.active_adapters if name != self.adapter_name] for layer in layers]
            wanted = [self._in_turn(names) if value else names for names in others]
            before = [layer._active_adapter for layer in layers]
            try:
                for layer, names in zip(layers, wanted, strict=True):
                    layer._active_adapter = names
            except BaseException:
                for layer, names in zip(layers, before, strict=True):
                    layer._active_adapter = names
                raise

    def _in_turn(self, others: list[str]) -> list[str]:
        """`others` and this memory, before those that came later: off and on again, sums are rounded as they were."""
        came = list(self.model.peft_config)
        later = came[came.index(self.adapter_name) + 1 :]
        place = next((i for i, name in enumerate(others) if name in later), len(others))
        return [*others[:place], self.adapter_name, *others[place:]]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context, and in its thread, the model is what it is without this memory, bit for bit."""
        self._check_attached()
        with exclusive_use(self.model):
            layers = self.tuner_layers()
            before = [layer._active_adapter for layer in layers]
            try:
                self.active = False
                yield
            finally:
                for layer, names in zip(layers, before, strict=True):
                    layer._active_adapter = names

    def num_parameters(self) -> int:
        """How many numbers the memory stores."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The memory's tensors under PEFT's checkpoint names (without the adapter's name)."""
        self._check_attached()
        return adapter_tensors(self.model, self.adapter_name)

    def remove(self) -> None:
        """Take the memory out. When it was the last adapter, nothing is left: no hook, parameter, config or key.

        Base parameters that were trainable before the first memory came are trainable again after the last one.
        """
        self._check_attached()
        with exclusive_use(self.model), self._rollback_on_error():
            self._detach()
            forget_adapter(self.model, self.adapter_name)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Save `adapter_config.json`, `adapter_model.safetensors` and a model card (README.md), all or none.

        Files of a memory that was saved there before, and that this one does not have, are deleted; others stay.

        Raises:
            NotADirectoryError: If `save_directory` is a file.
            OSError: If its disk is full, or it cannot be written.
        """
        config = self.config
        with atomic_directory(save_directory) as staging:
            self._write_files(staging)
            (staging / CARD_FILE).write_text(model_card(config, self.num_parameters()), encoding="utf-8")
            replace_memory(staging, Path(save_directory))

    def _write_files(self, folder: Path) -> None:
        """Write what the method saves: here its PEFT adapter."""
        tensors = {PEFT_KEY_PREFIX + name: tensor for name, tensor in self.state_dict().items()}
        write_tensors(folder / WEIGHTS_FILE, tensors)
        config = copy.copy(self._adapter_config)
        config.inference_mode = True
        if isinstance(targets := getattr(config, "target_modules", None), set):
            config.target_modules = sorted(targets)  # PEFT 0.21.0 writes a set in any order
        config.save_pretrained(str(folder))

    @classmethod
    def _read_files(cls, folder: Path, config: MemoryConfig, decoder: Decoder) -> Any:
        """Read and check what `_write_files` wrote, for `_restore`; nothing is changed."""
        shapes = config.tensor_shapes(decoder)
        return read_tensors(folder / WEIGHTS_FILE, {PEFT_KEY_PREFIX + name: shape for name, shape in shapes.items()})

    def _restore(self, contents: Any) -> None:
        """Put what `_read_files` read into a memory that was just injected."""
        tensors = {name.removeprefix(PEFT_KEY_PREFIX): tensor for name, tensor in contents.items()}
        set_adapter_tensors(self.model, self.adapter_name, tensors)

    def _write_repository(self, folder: Path) -> None:
        self.save_pretrained(folder)

    def _replaced(self) -> list[str]:
        return saved_file_names()

    def __repr__(self) -> str:
        if not self.attached:
            return f"{type(self).__name__}({self.adapter_name!r}, removed)"
        state = "active" if self.active else "inactive"
        return f"{type(self).__name__}({self.adapter_name!r}, {state}, {self.num_parameters():,} parameters)"
