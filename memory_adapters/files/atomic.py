"""Atomic writes: files are replaced together or not at all.

New files are written to a staging folder beside the old ones, flushed to the disk, and committed by one rename. From
then on they count: if the process is killed before they are in their places, the next save or load of the folder moves
them there. Saves and loads of a folder hold its lock, so they never see a mix of two saves.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from memory_adapters.files.disk_errors import REMEDIES, explain_disk_errors
from memory_adapters.files.locks import folder_lock, user_id

__all__ = ["atomic_directory", "atomic_file", "finish_interrupted_save", "read_lock", "replacing", "scratch_folder"]

OWN = ".memory-adapters-"
STAGING = f"{OWN}staging-"
COMMITTED = f"{OWN}committed"
REPLACED = f"{OWN}replaced-"  # in a committed save: the old file with the rest of this name is deleted
SCRATCH = f"{OWN}scratch-"
MINUTE = 60
POLL_SECONDS = 0.01


@contextmanager
def atomic_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Replace files of a folder together: write them to the folder that this yields; after an error none is replaced.

    Other saves and loads of `directory` wait meanwhile. Files in it that are not replaced stay. Subfolders are replaced
    in the same way, file by file.

    Raises:
        NotADirectoryError: If `directory` is a file, or a file has the name of a folder to be saved.
        IsADirectoryError: If a folder has the name of a file to be saved.
        OSError: If the disk is full or the folder cannot be written. The previous files are unchanged.
    """
    target = Path(directory)
    with explain_disk_errors(target):
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"`{target}` is a file; give a folder to save into.")
        target.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=target))
            try:
                yield staging
                _check_replaceable(staging, target)
                for path in (*staging.rglob("*"), staging):
                    _sync(path)
                _commit(staging, target)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            _finish(target)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replace one file: write it at the path that this yields. Its folder is made if it does not exist.

    Raises:
        OSError: As `atomic_directory`.
    """
    target = Path(path)
    with atomic_directory(target.parent) as staging:
        yield staging / target.name


def replacing(staging: Path, target: Path, names: Iterable[str]) -> None:
    """Delete these files of `target` when `staging` is committed, unless it replaces them."""
    for name in names:
        if not (staging / name).exists() and (target / name).exists():
            (staging / f"{REPLACED}{name}").touch()


@contextmanager
def read_lock(folder: Path) -> Iterator[None]:
    """Read files of one save: a killed save of `folder` is finished first, and other saves wait until the block ends.

    Raises:
        OSError: If a killed save has to be finished and the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder))
        except OSError as error:
            if error.errno not in REMEDIES or not _has_committed(folder):
                raise
            message = (
                f"{os.strerror(error.errno)}: a save into `{folder}` was killed before all its files were in their "
                "places. Load it once where it can be written, or save again."
            )
            raise OSError(error.errno, message) from error
        yield


def finish_interrupted_save(folder: Path) -> None:
    """Finish a committed save that was killed, and delete what other killed saves left.

    Raises:
        OSError: As `read_lock`.
    """
    with read_lock(folder):
        pass


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make an empty temporary folder for this block. A later call deletes those of killed processes."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):  # it is in use, or is gone by now
            state = left.lstat()
            if state.st_uid == user_id() and time.time() - state.st_mtime > MINUTE:  # younger, it may not be locked yet
                with FileLock(left / "lock", timeout=0):
                    pass
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as name, FileLock(Path(name) / "lock"):
        folder = Path(name) / "files"
        folder.mkdir()
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, after finishing a committed save in it and deleting what other killed saves left."""
    if any(part.startswith((STAGING, SCRATCH)) for part in Path(os.path.realpath(folder)).parts):
        yield  # no other thread knows of it
        return
    lock = folder_lock(folder)
    with lock.acquire(poll_interval=POLL_SECONDS):
        _finish(folder)
        if lock.lock_counter == 1:  # else this thread may be writing to one
            for left in folder.glob(f"{STAGING}*"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _has_committed(folder: Path) -> bool:
    committed = folder / COMMITTED
    return committed.is_dir() and not committed.is_symlink()


def _commit(staging: Path, target: Path) -> None:
    """Rename once; from that moment the new files count."""
    files = list(staging.iterdir())
    if len(files) == 1 and files[0].is_file() and not files[0].name.startswith(OWN):
        os.replace(files[0], target / files[0].name)
        staging.rmdir()
    else:
        os.rename(staging, target / COMMITTED)
    _sync(target)


def _finish(target: Path) -> None:
    """Move committed files to their places, holding the lock."""
    committed = target / COMMITTED
    if _has_committed(target):
        _check_replaceable(committed, target)
        for path in list(committed.iterdir()):
            place = target / path.name
            if path.name.startswith(REPLACED):
                (target / path.name.removeprefix(REPLACED)).unlink(missing_ok=True)
                path.unlink()
            elif path.is_dir() and not path.is_symlink():
                place.mkdir(exist_ok=True)
                with _locked(place):
                    os.rename(path, place / COMMITTED)
            else:
                os.replace(path, place)
        for folder in [path for path in target.iterdir() if path.is_dir() and not path.is_symlink()]:
            if _has_committed(folder):  # from above, or from a process that was killed here
                finish_interrupted_save(folder)
        committed.rmdir()
        _sync(target)


def _check_replaceable(staging: Path, target: Path) -> None:
    for path in staging.iterdir():
        place, wanted = target / path.name, "folder" if path.is_dir() else "file"
        found = "folder" if place.is_dir() else "file"
        if path.is_dir() and place.is_symlink():  # its files would be saved in a folder that was not named
            found = "link"
        if found != wanted and os.path.lexists(place):
            kind = IsADirectoryError if found == "folder" else NotADirectoryError
            raise kind(f"`{place}` is a {found}, but a {wanted} is to be saved there: move it, or save elsewhere.")
        if path.is_dir():
            _check_replaceable(path, place)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot flush a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
