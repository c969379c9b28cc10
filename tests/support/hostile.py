"""Saved files of every kind, and all that reads them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from memory_adapters import (
    Covariance,
    Fact,
    MemitConfig,
    MemoryAdapterConfig,
    MemorySlotsConfig,
    inject_memory,
    load_adapters,
    load_memory,
    save_adapters,
)
from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.fingerprint import base_fingerprint
from memory_adapters.composition.collection import _read_index
from memory_adapters.composition.peft_loading import _read_config as read_peft_config
from memory_adapters.files.item_files import read_items
from memory_adapters.inject import read_config
from memory_adapters.items import item_to_dict
from memory_adapters.memit.ledger import Ledger
from memory_adapters.memory_slots.slots import MemorySlots
from memory_adapters.registry import method_of
from tests.support.contract import fingerprint
from tests.support.models import byte_tokenizer, tiny_model


class Evil:
    """Fails the test that unpickles it."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


FACTS = [
    Fact("The Eiffel Tower is in", "Eiffel Tower", "Rome"),
    Fact("Ada Lovelace was born in", "Ada Lovelace", "Oslo"),
]


@dataclass(frozen=True)
class Target:
    """One way to read a folder.

    Attributes:
        files: Names of the files that are altered, by turns.
        read: What reads them, given the folder.
        whole: Whether it loads into a model, which takes longer.
    """

    files: tuple[str, ...]
    read: Callable[[Path], Any]
    whole: bool = False


class Reader:
    """Files of a small model, saved in `folder`, and all that reads them.

    Attributes:
        targets: By name; each has the folder of this name.
        originals: The bytes of every file, by target and name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: Any = tiny_model()
        self.tokenizer = byte_tokenizer()
        self.decoder = find_decoder(tiny_model())
        self.targets: dict[str, Target] = {}
        self._save()
        self.model = tiny_model()
        self.plain = fingerprint(self.model)
        config, weights, ledger = "adapter_config.json", "adapter_model.safetensors", "ledger.safetensors"
        settings, slots = "memory_config.json", "slots.safetensors"
        for method, own in (("residual", (config,)), ("edit", (settings, config, ledger)), ("slots", (config, slots))):
            self.targets[f"{method} config"] = Target(own[:1], self._config)
            self.targets[f"{method} files"] = Target((weights, *own), self._files)
            self.targets[f"{method} memory"] = Target((weights, *own), self._load, whole=True)
        self.targets |= {
            "slots file": Target((slots,), lambda f: MemorySlots.load(f / slots)),
            "covariance": Target(("covariance.safetensors",), self._covariance),
            "collection index": Target(("adapters.json",), lambda f: _read_index(f / "adapters.json")),
            "LoRA config": Target((config,), lambda f: read_peft_config(f / config)[0].to_dict()),
            "items": Target(("items.json", "items.jsonl"), lambda f: [read_items(p) for p in sorted(f.glob("items*"))]),
            "collection": Target(
                ("adapters.json", f"style/{config}", f"style/{weights}", f"facts/{config}"), self._load_all, whole=True
            ),
        }
        self.originals = {
            name: {file: (folder / name / file).read_bytes() for file in target.files}
            for name, target in self.targets.items()
        }
        self.expected = {name: digest(target.read(folder / name)) for name, target in self.targets.items()}

    def _save(self) -> None:
        residual = MemoryAdapterConfig(layers=[1, 2], memory_dim=4, token_gate="none", gate_init=0.5)
        memory = inject_memory(self.model, residual, tokenizer=self.tokenizer)
        self._keep(memory, "residual")
        edit: Any = inject_memory(self.model, MemitConfig(layers=[1, 2]), tokenizer=self.tokenizer)
        edit.ledger = _ledger(edit.ledger)
        edit.config.set_items(FACTS)
        edit._set_factors(edit.ledger)
        self._keep(edit, "edit")
        small = MemorySlotsConfig(num_slots=2, span_length=4, lora_rank=2)
        slots: Any = inject_memory(self.model, small, tokenizer=self.tokenizer)
        marked = slots.config.base_fingerprint
        slots.use(MemorySlots(torch.randn(3, 32), (2, 1), 6, marked, slots.encoder.fingerprint(), "0" * 64))
        self._keep(slots, "slots")
        (self.folder / "slots file").mkdir()
        slots_file = self.folder / "slots memory" / "slots.safetensors"
        (self.folder / "slots file" / slots_file.name).write_bytes(slots_file.read_bytes())
        keys = torch.randn(64, 48)
        gram = (keys.T @ keys / 64).double()
        gram = ((gram + gram.T) / 2).float()
        covariance = Covariance({1: gram, 2: gram}, 64, 2, "given texts", base_fingerprint(self.model))
        covariance.save(self.folder / "covariance" / "covariance.safetensors")
        (self.folder / "items").mkdir()
        items = [item_to_dict(fact) for fact in FACTS] + [{"text": "Some text."}, {"question": "Why?", "answer": "So."}]
        (self.folder / "items" / "items.json").write_text(json.dumps(items, indent=1))
        (self.folder / "items" / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
        self.model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "style")
        inject_memory(self.model, residual, adapter_name="facts")
        for name in ("collection", "collection index"):
            save_adapters(self.model, self.folder / name)
        (self.folder / "LoRA config").mkdir()
        lora = self.folder / "collection" / "style" / "adapter_config.json"
        (self.folder / "LoRA config" / lora.name).write_bytes(lora.read_bytes())

    def _keep(self, memory: Any, method: str) -> None:
        for kind in ("config", "files", "memory"):
            memory.save_pretrained(self.folder / f"{method} {kind}")
        memory.remove()

    def _config(self, folder: Path) -> Any:
        file = folder / "memory_config.json"
        config = read_config(file if file.is_file() else folder / "adapter_config.json")
        config.resolve(self.decoder)
        config.adapter_config(self.decoder)
        assert all(size < 1 << 63 for shape in config.tensor_shapes(self.decoder).values() for size in shape)
        return config.to_dict()

    def _files(self, folder: Path) -> Any:
        file = folder / "memory_config.json"
        config = read_config(file if file.is_file() else folder / "adapter_config.json")
        config.resolve(self.decoder)
        kind = method_of(config)
        assert kind is not None
        contents = kind.memory_class._read_files(folder, config, self.decoder)
        check_finite(contents)
        return contents

    def _covariance(self, folder: Path) -> Any:
        found = Covariance.load(folder / "covariance.safetensors")
        found.check_widths({1: 48, 2: 48})
        check_finite([found.shrunk(layer) for layer in found.matrices])
        return found.matrices, found.num_tokens, found.num_texts, found.source, found.base_fingerprint

    def _load(self, folder: Path) -> Any:
        try:
            memory: Any = load_memory(self.model, folder, tokenizer=self.tokenizer)
            state = memory.state_dict(), memory.items, getattr(memory, "slots", None)
            memory.remove()
        finally:
            assert fingerprint(self.model) == self.plain, "the model is not what it was"
        return state

    def _load_all(self, folder: Path) -> Any:
        model: Any = tiny_model()
        before = fingerprint(model)
        try:
            load_adapters(model, folder, tokenizer=self.tokenizer)
        except BaseException:
            assert fingerprint(model)[:4] == before[:4], "the model is not what it was"
            raise
        return {name: t for name, t in model.named_parameters() if {"style", "facts"} & set(name.split("."))}

    def outcome(self, name: str) -> str:
        """Read what is in the folder of a target: `"the same"`, `"another, valid"`, or the error's name.

        Raises:
            AssertionError: If the error names no file or field, or the model is not what it was before.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self.targets[name].read(self.folder / name)
        except (ValueError, OSError) as error:
            refused: Exception = error
        else:
            return "the same" if digest(found) == self.expected[name] else "another, valid"
        assert "`" in str(refused), f"an error that names nothing: {refused!r}"
        assert len(str(refused)) < 5_000, f"an error of {len(str(refused))} characters"
        return "OSError" if isinstance(refused, OSError) else "ValueError"

    @contextmanager
    def altered(self, name: str, file: str, data: bytes) -> Iterator[None]:
        """Within this context one file of a target holds `data`."""
        path = self.folder / name / file
        path.write_bytes(data)
        try:
            yield
        finally:
            path.write_bytes(self.originals[name][file])


def _ledger(empty: Ledger) -> Ledger:
    """Of two facts, with random numbers: three keys for each, as the default settings make two."""
    n, each = len(FACTS), 2
    keys = {layer: torch.randn(n * each, rows.shape[1]) for layer, rows in empty.keys.items()}
    shares = {layer: torch.randn(n, rows.shape[1]) for layer, rows in empty.shares.items()}
    whitened = {layer: rows.double() / 3 for layer, rows in keys.items()}
    return Ledger(tuple(FACTS), keys, shares, whitened, half=True)


def check_finite(value: Any) -> None:
    """No tensor in `value` holds NaN or infinity, in float32 too."""
    if isinstance(value, torch.Tensor):
        assert value.float().isfinite().all()
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            check_finite(inner)
    elif hasattr(value, "__dict__"):
        check_finite(vars(value))


def digest(value: Any) -> Any:
    """Something to compare results by."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(raw).hexdigest()
    if isinstance(value, dict):
        return {str(key): digest(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [digest(inner) for inner in value]
    return digest(vars(value)) if hasattr(value, "__dict__") else repr(value)
