"""What is killed beside saving: fitting, training, writing, pushing and loading; and what must be true afterwards."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from huggingface_hub import constants

from memory_adapters import CovarianceFitter, inject_memory, load_memory
from memory_adapters.memory_slots.encoder_training import train_encoder
from memory_adapters.training.checkpoints import newest_checkpoint
from tests.memit.test_covariance import TEXTS
from tests.memory_slots.test_encoder_training import QUIET, text_examples
from tests.memory_slots.test_slots import memory_on as slots_on
from tests.reliability.operations import (
    Operation,
    Save,
    SaveAll,
    SaveEdit,
    SaveFiles,
    SaveSame,
    SaveSlots,
    age,
    files_of,
    spoken,
)
from tests.residual_mlp.test_write import FACT, OTHER, UNRELATED
from tests.residual_mlp.test_write import fresh as residual_on
from tests.support.composing import SUITES, put
from tests.support.contract import logits
from tests.support.models import byte_tokenizer, tiny_model

__all__ = ["EVERY"]


class Resumed(Operation):
    """Work that is gone on with after the kill, and must come to the same bytes."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.begin()
        self.whole = self.finish()

    def run(self) -> None:
        self.finish()

    @abstractmethod
    def finish(self) -> dict[str, bytes]:
        """Do the work, going on from what is there; the files that it comes to."""

    def outcome(self) -> str:
        kept = self.kept()
        assert self.finish() == self.whole, f"{self.name}: other bytes after going on from {kept}"
        return f"the same bytes, gone on from {'nothing' if kept is None else 'a checkpoint'}"

    def kept(self) -> Any:
        """What there is to go on from; None if nothing."""
        return newest_checkpoint(self.folder)


class FitCovariance(Resumed):
    """Covariance fitting"""

    def finish(self) -> dict[str, bytes]:
        with patch("memory_adapters.memit.corpus.PORTION_TOKENS", 300):
            fitter = CovarianceFitter(tiny_model(), byte_tokenizer(), [1, 2])
            fitter.fit(TEXTS, 2500, checkpoint=self.folder / "state.safetensors", progress=False)
        fitter.covariance().save(self.folder / "c.safetensors")
        return files_of(self.folder)

    def kept(self) -> Any:
        return next(self.folder.glob("state.safetensors"), None)


class Pretraining(Resumed):
    """Slot pretraining"""

    def finish(self) -> dict[str, bytes]:
        memory = slots_on(tiny_model())
        steps = dict(max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2, learning_rate=1e-2)
        train_encoder(
            memory,
            text_examples(),
            training_args=QUIET | steps | {"output_dir": str(self.folder)},
            resume_from_checkpoint=newest_checkpoint(self.folder) or False,
        )
        memory.save_pretrained(self.folder / "trained")
        return {name: files_of(self.folder / "trained")[name] for name in ("adapter_model.safetensors",)}


class WriteResumed(Resumed):
    """write of a residual memory with checkpoints"""

    def finish(self) -> dict[str, bytes]:
        memory = residual_on(token_gate="keys")
        steps = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "output_dir": str(self.folder)}
        memory.write(
            [FACT, OTHER],
            unrelated=UNRELATED,
            training_args={"disable_tqdm": True} | steps,
            resume_from_checkpoint=newest_checkpoint(self.folder) or False,
        )
        memory.save_pretrained(self.folder / "written")
        return {name: files_of(self.folder / "written")[name] for name in ("adapter_model.safetensors",)}


class Write(Operation):
    """write and save_pretrained of a residual memory"""

    kind: ClassVar[str] = "residual"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.old = put(tiny_model(), self.kind, "knowledge", 1)
        self.said = hashlib.sha256(logits(self.old.model).numpy().tobytes()).hexdigest()  # type: ignore[union-attr]
        self.begin()
        self.run()
        self.written = spoken(self.folder)

    def prepare(self) -> None:
        self.old.save_pretrained(self.folder)  # type: ignore[union-attr]

    def run(self) -> None:
        memory = inject_memory(tiny_model(), SUITES[self.kind].make_config(), tokenizer=byte_tokenizer())
        SUITES[self.kind].write(memory)
        memory.save_pretrained(self.folder)

    def outcome(self) -> str:
        said = spoken(self.folder)
        assert said in (self.said, self.written)
        return "previous" if said == self.said else "new"


class WriteEdit(Write):
    """write and save_pretrained of an edit"""

    kind = "memit"


class WriteSlots(Write):
    """write and save_pretrained of slots"""

    kind = "slots"


class Upload(Operation):
    """push_to_hub, over a memory of the same settings"""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.memories = [put(tiny_model(), "residual", "knowledge", seed) for seed in (1, 2)]
        self.said = [hashlib.sha256(logits(m.model).numpy().tobytes()).hexdigest() for m in self.memories]  # type: ignore[union-attr]

    @property
    def repo(self) -> str:
        return f"me/{self.folder.name}"

    def prepare(self) -> None:
        self.memories[0].push_to_hub(self.repo)  # type: ignore[union-attr]

    def run(self) -> None:
        self.memories[1].push_to_hub(self.repo)  # type: ignore[union-attr]

    def outcome(self) -> str:
        said = spoken(self.repo)
        assert said in self.said
        self.run()
        assert spoken(self.repo) == self.said[1]
        check_cache(self.repo)
        return "previous" if said == self.said[0] else "new"


class Download(Upload):
    """load_memory from the Hub, into an empty cache"""

    def run(self) -> None:
        assert spoken(self.repo) == self.said[0]

    def outcome(self) -> str:
        folder = cache_of(self.repo)
        before = bool(list(folder.rglob("*.safetensors")))
        self.run()
        check_cache(self.repo)
        return "loads; " + ("the weights were there" if before else "the weights were not there")


def cache_of(repo_id: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def check_cache(repo_id: str) -> None:
    """Nothing half downloaded is left in the Hub's cache."""
    folder = cache_of(repo_id)
    for path in [*folder.glob("tmp*"), *folder.glob("blobs/tmp*"), *folder.glob("trees/*.tmp")]:
        age(path)
    load_memory(tiny_model(), repo_id)
    left = [path for path in folder.rglob("*") if "incomplete" in path.name or path.name.startswith("tmp")]
    assert not left, f"left {left}"


EVERY: tuple[type[Operation], ...] = (
    Save, SaveSame, SaveSlots, SaveEdit, SaveAll, SaveFiles, FitCovariance, Pretraining, WriteResumed, Write, WriteEdit,
    WriteSlots, Upload, Download,
)  # fmt: skip
