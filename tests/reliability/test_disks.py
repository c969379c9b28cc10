"""Full disks and folders that cannot be written: a clear error, and the previous files whole."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import Covariance, CovarianceFitter, MemorySlots, load_adapters, load_memory, save_adapters
from memory_adapters.files.atomic import COMMITTED, OWN, atomic_file
from memory_adapters.training.checkpoints import newest_checkpoint
from tests.files.test_hub_faults import publish
from tests.memit.test_covariance import TEXTS
from tests.reliability.disks import fill, largest_file, read_only, small_disk
from tests.reliability.operations import files_of
from tests.residual_mlp.test_write import FACT, OTHER, UNRELATED
from tests.residual_mlp.test_write import fresh as residual_on
from tests.support.composing import SUITES, put
from tests.support.contract import logits
from tests.support.hub import HubServer
from tests.support.hub_client import loaded_hash, logits_hash, run_client, with_memory
from tests.support.models import byte_tokenizer, tiny_model

FULL = r"(No space left on device|File too large): nothing was saved in `.*{}`; .* Free space on its disk"
CLOSED = r"(Read-only file system|Permission denied): nothing was saved in `.*{}`; .* Make it writable"
METHODS = [*SUITES, "all", "slots' file", "covariance", "text", "vllm", "merged"]


def saver(kind: str) -> tuple[Callable[[Path], object], Callable[[Path], object] | None]:
    """How to save what is called `kind`, and to load it."""
    if kind in SUITES:
        memory = put(tiny_model(), kind, "knowledge", 1)
        return memory.save_pretrained, lambda folder: load_memory(tiny_model(), folder)  # type: ignore[union-attr]
    if kind == "all":
        model = tiny_model()
        for each in ("lora", "residual", "slots"):
            put(model, each, each, 1)
        return lambda folder: save_adapters(model, folder), lambda folder: load_adapters(tiny_model(), folder)
    if kind in ("vllm", "merged"):
        edit = put(tiny_model(), "memit", "knowledge", 1)
        return lambda folder: edit.export(folder, format=kind), None  # type: ignore[arg-type]
    if kind == "text":
        return lambda folder: write_text(folder / "text.json", "1" * 4000), None
    fingerprint = dict(put(tiny_model(), "slots", "knowledge", 1).config.base_fingerprint)  # type: ignore[union-attr]
    if kind == "covariance":
        covariance = Covariance({1: torch.eye(32)}, 5, 5, "text", fingerprint)
        return lambda folder: covariance.save(folder / covariance.file), Covariance.load
    slots = MemorySlots(torch.ones(32, 32), (32,), 40, fingerprint, None, "0")
    return lambda folder: slots.save(folder / slots.file), MemorySlots.load


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as staging:
        staging.write_text(text)


@pytest.mark.parametrize("kind", METHODS)
def test_what_does_not_fit_leaves_the_previous(kind: str, tmp_path: Path) -> None:
    save, load = saver(kind)
    folder = tmp_path / "saved"
    save(folder)
    before = files_of(folder)
    with largest_file(700), pytest.raises(OSError, match=FULL.format("saved")) as raised:
        save(folder)
    assert raised.value.errno == errno.EFBIG
    assert files_of(folder) == before
    if load is not None:
        load(folder)
    save(folder)
    assert files_of(folder) == before


@pytest.mark.parametrize("kind", ["residual", "all", "covariance", "merged"])
def test_a_full_disk_leaves_the_previous(kind: str, tmp_path: Path) -> None:
    save, load = saver(kind)
    with small_disk(tmp_path / "disk", 2048) as disk:
        save(disk / "saved")
        before = files_of(disk / "saved")
        filler = fill(disk)
        with pytest.raises(OSError, match=FULL.format("saved")) as raised:
            save(disk / "saved")
        assert raised.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match=FULL.format("new")):
            save(disk / "new")
        assert files_of(disk / "saved") == before
        if load is not None:
            load(disk / "saved")
        filler.unlink()
        save(disk / "saved")
        assert files_of(disk / "saved") == before


def test_work_goes_on_once_there_is_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory_adapters.memit.corpus.PORTION_TOKENS", 400)

    def fit(file: Path) -> Any:
        return CovarianceFitter(tiny_model(), byte_tokenizer(), [1]).fit(TEXTS, 2000, checkpoint=file, progress=False)

    def write(folder: Path, resume: bool) -> Any:
        memory = residual_on()
        steps = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(folder), "disable_tqdm": True}
        memory.write([FACT, OTHER], unrelated=UNRELATED, training_args=steps, resume_from_checkpoint=resume)
        return memory.state_dict()

    fitted = fit(tmp_path / "c").covariance().matrices[1]
    written = write(tmp_path / "run", False)
    with small_disk(tmp_path / "disk", 300) as disk:
        with pytest.raises((OSError, RuntimeError)):  # Trainer's own files say so in their own way
            write(disk / "run", False)
        assert newest_checkpoint(disk / "run") is not None
        for file in (disk / "run").rglob("*"):  # what the next save did not fit into makes room for what follows
            if file.is_file() and str(file.parent) != newest_checkpoint(disk / "run"):
                file.unlink()
        filler = fill(disk)
        with pytest.raises(OSError, match=FULL.format("disk")):
            fit(disk / "c")
        filler.unlink()
        assert torch.equal(fit(disk / "c").covariance().matrices[1], fitted)
        kept = newest_checkpoint(disk / "run")
        assert kept is not None
        again = residual_on()
        steps = {"output_dir": str(tmp_path / "on"), "disable_tqdm": True}
        again.write([FACT, OTHER], unrelated=UNRELATED, training_args=steps, resume_from_checkpoint=kept)
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, written[name])


@pytest.mark.parametrize("kind", METHODS)
def test_a_folder_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    save, load = saver(kind)
    folder = tmp_path / "saved"
    save(folder)
    before = files_of(folder)
    with read_only(folder):
        with pytest.raises(OSError, match=CLOSED.format("saved")):
            save(folder)
        assert files_of(folder) == before
        if load is not None:
            load(folder)
    with read_only(tmp_path), pytest.raises(OSError, match=CLOSED.format("new")):
        save(tmp_path / "new")


def test_a_killed_save_is_not_half_loaded_where_it_cannot_be_finished(tmp_path: Path) -> None:
    new, old = (put(tiny_model(), "residual", "knowledge", seed) for seed in (1, 2))
    assert new is not None
    assert old is not None
    folder = tmp_path / "saved"
    old.save_pretrained(folder)
    new.save_pretrained(folder / COMMITTED)
    before = files_of(folder)
    with read_only(folder):
        with pytest.raises(OSError, match="was killed before all its files were in their places"):
            load_memory(tiny_model(), folder)
        assert files_of(folder) == before
    model = tiny_model()
    load_memory(model, folder)
    assert torch.equal(logits(model), logits(new.model))
    assert not [name for name in files_of(folder) if OWN in name]


def test_a_place_that_is_taken_is_said_before_anything_changes(tmp_path: Path) -> None:
    save, _ = saver("residual")
    (tmp_path / "saved" / "README.md").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"README.md` is a folder, but a file is to be saved there"):
        save(tmp_path / "saved")
    everything, _ = saver("all")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "lora").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"lora` is a file, but a folder is to be saved there"):
        everything(tmp_path / "all")
    assert files_of(tmp_path) == {"all/lora": b"mine"}


def failing_load(repo: str) -> dict[str, Any]:
    """In a client of the Hub whose disk is full: the error's number and words."""
    warnings.simplefilter("ignore")  # huggingface_hub's own look at the space
    try:
        loaded_hash(repo)
    except OSError as error:
        return {"errno": error.errno, "message": str(error)}
    raise AssertionError("there was space")


@pytest.mark.integration
def test_the_hub_and_a_full_disk(loopback_hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shas = publish(loopback_hub, "me/full", 0, folder=tmp_path / "0")
    with small_disk(tmp_path / "disk", 256) as disk:
        fill(disk)
        found = run_client(loopback_hub, disk / "home", failing_load, "me/full")
        assert found["errno"] == errno.ENOSPC
        assert f"{disk}/home" in found["message"]
        assert "HF_HOME" in found["message"]
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        with pytest.raises(OSError, match=FULL.format("files")) as raised:
            with_memory(seed=1).push_to_hub("me/full")
        assert raised.value.errno == errno.ENOSPC
    assert list(loopback_hub.repos["me/full"].commits) == shas
    assert run_client(loopback_hub, tmp_path / "home", loaded_hash, "me/full") == logits_hash(with_memory(0).model)
