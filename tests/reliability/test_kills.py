"""Killed at any moment, and several processes at once: the short run of `python -m tests.reliability`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from memory_adapters import load_memory
from memory_adapters.files import tensors
from memory_adapters.files.atomic import (
    COMMITTED,
    MINUTE,
    SCRATCH,
    STAGING,
    atomic_directory,
    atomic_file,
    finish_interrupted_save,
    read_lock,
    scratch_folder,
)
from memory_adapters.files.locks import folder_lock
from memory_adapters.training.checkpoints import checkpoint_to_resume, newest_checkpoint
from tests.reliability.__main__ import MEMORY, run_worker
from tests.reliability.operations import age, files_of
from tests.reliability.together import files_of_two_saves, memory_of
from tests.support.contract import logits
from tests.support.hub import HubServer
from tests.support.models import tiny_model

ROOT = Path(__file__).parents[2]
QUICK = ["Save", "SaveAll", "SaveFiles", "FitCovariance", "Upload", "Download"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


@pytest.mark.integration
def test_what_is_killed_leaves_the_previous_or_the_new(loopback_hub: HubServer, folder: Path) -> None:
    asked = ("--every", "9", "--random", "0", "--only", *QUICK)
    run = run_worker(loopback_hub, folder, *asked, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *rows, total = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("{"))
    assert len(rows) == len(QUICK)
    assert total["kills"] >= 25
    assert total["in the middle"] >= 0.8 * total["kills"]


@pytest.mark.integration
def test_processes_that_save_and_load_at_once_see_one_save(folder: Path) -> None:
    command = [sys.executable, "-m", "tests.reliability.together", str(folder), "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert min(json.loads(run.stdout.splitlines()[-1]).values()) > 0


def test_threads_that_save_and_load_at_once_see_one_save(tmp_path: Path) -> None:
    memories = [memory_of(seed) for seed in (0, 1)]
    said = [logits(memory.model) for memory in memories]
    memories[0].save_pretrained(tmp_path)
    stop = threading.Event()

    def save(memory: Any) -> None:
        while not stop.is_set():
            memory.save_pretrained(tmp_path)

    with ThreadPoolExecutor(3) as pool:
        savers = [pool.submit(save, memory) for memory in (*memories, memories[0])]
        try:
            for _ in range(10):
                model = tiny_model()
                load_memory(model, tmp_path)
                assert any(logits(model).equal(one) for one in said)
        finally:
            stop.set()
        for saver in savers:
            saver.result()
    assert not any(memory._adapter_config.inference_mode for memory in memories)


def test_what_is_being_saved_is_left_alone(tmp_path: Path) -> None:
    dead = tmp_path / f"{STAGING}dead"
    dead.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with folder_lock(tmp_path):
            clearing = pool.submit(finish_interrupted_save, tmp_path)
            with pytest.raises(TimeoutError):
                clearing.result(0.2)
            assert dead.is_dir()
        clearing.result()
    assert not list(tmp_path.iterdir())


def test_a_thread_may_read_what_it_is_replacing(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_directory(tmp_path) as staging:
            (staging / "a").write_text(text)
            with read_lock(tmp_path), atomic_file(tmp_path / "b") as other:
                other.write_text(text)
            (staging / "c").write_text(text)
    assert files_of(tmp_path) == {"a": b"new", "b": b"new", "c": b"new"}


@pytest.mark.parametrize("reason", ["read-only", "no home"])
def test_without_a_cache_locks_are_in_the_temporary_folder(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMORY_ADAPTERS_CACHE", str(tmp_path / "file") if reason == "read-only" else "")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with atomic_file(tmp_path / "folder" / "a") as staging:
        staging.write_text("a")
    assert files_of(tmp_path / "folder") == {"a": b"a"}
    (locks,) = tmp_path.glob("memory-adapters-locks-*")
    assert [path.suffix for path in locks.iterdir()] == [".lock"]
    if os.geteuid() == 0:
        os.chown(locks, 12345, 12345)
        with pytest.raises(PermissionError, match="is another user's: set MEMORY_ADAPTERS_CACHE"):
            finish_interrupted_save(tmp_path / "folder")


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A folder from somewhere else may hold anything."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / COMMITTED).symlink_to(tmp_path / "private")
    (tmp_path / "memory" / f"{STAGING}x").symlink_to(tmp_path / "private")
    finish_interrupted_save(tmp_path / "memory")
    with read_lock(tmp_path / "memory"):
        pass
    assert files_of(tmp_path / "private") == {"key": b"secret"}


def test_scratch_folders_go_with_their_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old, new = tmp_path / f"{SCRATCH}old", tmp_path / f"{SCRATCH}new"
    for path in (old, new, tmp_path / "other"):
        path.mkdir()
    age(old)
    with scratch_folder() as mine:
        (mine / "file").write_text("")
        age(mine.parent)
        with scratch_folder():
            assert (mine / "file").exists()
        assert not old.exists()
        assert new.exists(), f"younger than {MINUTE} s"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([new.name, "other"])


def test_folders_in_folders_are_replaced_file_by_file(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "out") as staging:
            (staging / "a" / "b").mkdir(parents=True)
            (staging / "a" / "b" / "x").write_text(text)
            (staging / "a" / text).write_text(text)
            (staging / "y").write_text(text)
    assert files_of(tmp_path / "out") == {"a/b/x": b"new", "a/old": b"old", "a/new": b"new", "y": b"new"}


def test_a_checkpoint_that_was_being_saved_is_passed_over(tmp_path: Path) -> None:
    for step, text in ((3, '{"global_step": 3}'), (12, '{"global_st'), (9, '{"global_step": 9}')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-20").mkdir()
    assert newest_checkpoint(tmp_path) == checkpoint_to_resume(True, tmp_path) == str(tmp_path / "checkpoint-9")
    assert checkpoint_to_resume(str(tmp_path / "checkpoint-3"), None) == str(tmp_path / "checkpoint-3")
    assert checkpoint_to_resume(False, tmp_path) is None
    with pytest.raises(ValueError, match="an incomplete one: name an earlier one"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-12"), None)
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        checkpoint_to_resume(True, tmp_path / "checkpoint-3")


@pytest.mark.parametrize("number", [0, 1], ids=["covariance", "slots"])
def test_header_and_tensors_of_a_file_are_of_one_save(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = files_of_two_saves()[number]
    old.save(tmp_path / old.file)
    old_bytes = (tmp_path / old.file).read_bytes()
    with ThreadPoolExecutor(1) as pool:
        saving = []

        def read_metadata(path: Path) -> Any:
            found = tensors.read_metadata(path)
            saving.append(pool.submit(new.save, path))
            wait(saving, 0.2)
            return found

        monkeypatch.setattr(sys.modules[type(old).__module__], "read_metadata", read_metadata)
        read = type(old).load(tmp_path)
        saving[0].result()
    assert (tmp_path / old.file).read_bytes() != old_bytes
    read.save(tmp_path / "read" / old.file)
    assert (tmp_path / "read" / old.file).read_bytes() == old_bytes
