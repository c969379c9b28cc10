"""What is killed while it saves, and what must be true afterwards."""

from __future__ import annotations

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from memory_adapters import Covariance, load_adapters, load_memory, save_adapters
from memory_adapters.files.atomic import MINUTE, OWN, SCRATCH, atomic_file, scratch_folder
from memory_adapters.memory_slots import MemorySlots
from tests.support.composing import put
from tests.support.contract import logits
from tests.support.models import byte_tokenizer, tiny_model

MINE = "mine.txt"


class Operation(ABC):
    """One operation, done again and again in fresh folders.

    Attributes:
        folder: Where it works now.
        temporary: What the temporary folder held before.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0
        self.folder = root
        self.temporary: set[Path] = set()

    @property
    def name(self) -> str:
        return type(self).__doc__.splitlines()[0].rstrip(".")  # type: ignore[union-attr]

    def begin(self) -> None:
        """What was there before."""
        self.count += 1
        self.folder = self.root / f"{type(self).__name__}-{self.count}"
        self.folder.mkdir()
        self.temporary = set(Path(tempfile.gettempdir()).iterdir())  # torch 2.6 keeps a folder there
        self.prepare()

    def prepare(self) -> None:  # noqa: B027  # work that starts from nothing has none
        """Put the previous state into `folder`."""

    @abstractmethod
    def run(self) -> None:
        """The operation, in the child."""

    @abstractmethod
    def outcome(self) -> str:
        """What is there now; an `AssertionError` if it must not be."""

    def after(self) -> str:
        """`outcome`, and that nothing is left which does not belong there."""
        found = self.outcome()
        left = [path for path in self.folder.rglob("*") if OWN in path.name or path.name.startswith(".")]
        assert not left, f"{self.name}: left {left}"
        temporary = Path(tempfile.gettempdir())
        for path in temporary.glob(f"{SCRATCH}*"):
            age(path)
        with scratch_folder():
            pass
        left = sorted(set(temporary.iterdir()) - self.temporary)
        assert not left, f"{self.name}: left {left}"
        return found


def age(path: Path) -> None:
    """As if it had been there for two minutes."""
    old = path.stat().st_mtime - 2 * MINUTE
    os.utime(path, (old, old))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spoken(folder: str | Path) -> str:
    """What the model says with the memory in a folder or repository."""
    model = tiny_model()
    load_memory(model, folder, tokenizer=byte_tokenizer())
    return hashlib.sha256(logits(model).numpy().tobytes()).hexdigest()


class Save(Operation):
    """save_pretrained, over a memory of another method"""

    kinds: ClassVar[tuple[str, str]] = ("memit", "residual")

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.old, self.new = (self.memory(kind, seed) for seed, kind in enumerate(self.kinds))
        self.said = {}
        for name, memory in (("previous", self.old), ("new", self.new)):
            self.said[name] = hashlib.sha256(logits(memory.model).numpy().tobytes()).hexdigest()
            memory.save_pretrained(root / f"{type(self).__name__}-{name}")
        self.files = {name: files_of(root / f"{type(self).__name__}-{name}") for name in self.said}

    def memory(self, kind: str, seed: int) -> Any:
        return put(tiny_model(), kind, "knowledge", seed)

    def prepare(self) -> None:
        self.old.save_pretrained(self.folder)
        (self.folder / MINE).write_text("kept")

    def run(self) -> None:
        self.new.save_pretrained(self.folder)

    def outcome(self) -> str:
        said = spoken(self.folder)
        (name,) = [name for name in self.said if self.said[name] == said]
        assert files_of(self.folder) == {**self.files[name], MINE: b"kept"}
        return name


class SaveSame(Save):
    """save_pretrained, over a memory of the same settings"""

    kinds = ("residual", "residual")


class SaveSlots(Save):
    """save_pretrained of slots, over an edit"""

    kinds = ("memit", "slots")


class SaveEdit(Save):
    """save_pretrained of an edit, over slots"""

    kinds = ("slots", "memit")


class SaveAll(Operation):
    """save_adapters of three adapters, over four"""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.models = {"previous": tiny_model(), "new": tiny_model()}
        for kind in ("residual", "memit", "slots", "lora"):
            put(self.models["previous"], kind, kind, 1)
        for kind in ("lora", "slots", "residual"):
            put(self.models["new"], kind, kind, 2)
        self.said = {name: logits(model) for name, model in self.models.items()}

    def prepare(self) -> None:
        save_adapters(self.models["previous"], self.folder)

    def run(self) -> None:
        save_adapters(self.models["new"], self.folder)

    def outcome(self) -> str:
        model = tiny_model()
        load_adapters(model, self.folder, tokenizer=byte_tokenizer())
        (name,) = [name for name, said in self.said.items() if said.equal(logits(model))]
        return name


class SaveFiles(Operation):
    """One file at a time: slots, a covariance, a report"""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        fingerprint = dict(put(tiny_model(), "slots", "knowledge", 0).config.base_fingerprint)  # type: ignore[union-attr]
        ones = tiny_model().get_input_embeddings().weight.detach()[:4]
        self.slots = [MemorySlots(ones * factor, (4,), 8, fingerprint, None, "0") for factor in (1, 2)]
        self.covariances = [Covariance({1: ones @ ones.T}, n, n, "text", fingerprint) for n in (5, 6)]

    def put(self, which: int) -> None:
        self.slots[which].save(self.folder / "slots.safetensors")
        self.covariances[which].save(self.folder / "c.safetensors")
        with atomic_file(self.folder / "report.json") as staging:
            staging.write_text(f"{which}" * 1000)

    def prepare(self) -> None:
        self.put(0)

    def run(self) -> None:
        self.put(1)

    def outcome(self) -> str:
        slots = MemorySlots.load(self.folder / "slots.safetensors").vectors
        covariance = Covariance.load(self.folder / "c.safetensors")
        report = (self.folder / "report.json").read_text()
        assert report in ("0" * 1000, "1" * 1000)
        new = [bool(slots.equal(self.slots[1].vectors)), covariance.num_tokens == 6, report[0] == "1"]
        assert slots.equal(self.slots[new[0]].vectors)
        assert new == sorted(new, reverse=True), "in the order in which they were saved"
        return "new" if all(new) else "some new" if any(new) else "previous"
