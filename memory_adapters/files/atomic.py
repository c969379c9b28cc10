"""Writing that cannot half-happen: files replaced together, folders locked, no litter of killed processes.

A lock is `flock` on the folder itself: it is no file, it keeps out other threads and processes, and it ends with its
process, however that ends. So whatever unfinished save is found under the lock was left by a process that is gone. Of
network file systems some lock for one machine only, and some not at all: there, what another machine may be writing is
left alone for a day, and two saves at once must be kept apart by whoever starts them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_directory",
    "atomic_file",
    "finish_interrupted_save",
    "locked",
    "read_lock",
    "replacing",
    "scratch_folder",
]

OWN = ".memory-adapters-"
STAGING = f"{OWN}staging-"
COMMITTED = f"{OWN}committed"
REPLACED = f"{OWN}replaced-"  # in a committed save: the file of the name behind this goes
SCRATCH = f"{OWN}scratch-"
DAY = 24 * 3600
MINUTE = 60
NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free space on its disk, or save elsewhere."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make it writable, or save elsewhere."),
}


@contextmanager
def atomic_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write files into that replace those of `directory` together, once the block ends without error.

    Other saves and loads of `directory` wait meanwhile. Killed before the commit, `directory` keeps its previous
    files; killed after it, the next load or save there finishes the move. Other files in `directory` stay. Folders
    in the new one replace those of `directory` in the same way, file by file.

    Raises:
        NotADirectoryError: If `directory` is a file, or a file stands where a folder is to be.
        IsADirectoryError: If a folder stands where a file is to be.
        OSError: If the disk is full or the folder cannot be written; the previous files are whole.
    """
    target = Path(directory)
    with _explained(target):
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"`{target}` is a file; give a folder to save into.")
        target.mkdir(parents=True, exist_ok=True)
        with locked(target) as sole:
            _settle(target, sole)
            staging = Path(tempfile.mkdtemp(prefix=_prefix(), dir=target))
            try:
                yield staging
                _check_replaceable(staging, target)
                for path in staging.rglob("*"):
                    _sync(path)
                _commit(staging, target)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            _settle(target, sole)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file at that replaces the one at `path` once the block ends without error; makes its folder.

    Raises:
        OSError: As `atomic_directory`.
    """
    target = Path(path)
    with atomic_directory(target.parent) as staging:
        yield staging / target.name


def replacing(staging: Path, target: Path, names: Iterable[str]) -> None:
    """Let files of `target` go with the commit of `staging`, except those that it has anew."""
    for name in names:
        if not (staging / name).exists() and (target / name).exists():
            (staging / f"{REPLACED}{name}").touch()


@contextmanager
def read_lock(folder: Path) -> Iterator[None]:
    """Within this context the files of `folder` are those of one save: saves wait, one that was killed is finished.

    Raises:
        OSError: If a save that was killed can only be finished by writing, and the folder is read-only.
    """
    while True:
        finish_interrupted_save(folder)
        with locked(folder, shared=True):
            if not _has_committed(folder):  # or else one was killed between these two lines
                yield
                return


def finish_interrupted_save(folder: Path) -> None:
    """Finish a committed save that was killed, and clear what killed saves left.

    Raises:
        OSError: If the folder is read-only, and a committed save was left.
    """
    try:
        found = [name for name in os.listdir(folder) if name.startswith((COMMITTED, STAGING))]
    except PermissionError:  # files in it can be read all the same
        return
    if not found or not (_has_committed(folder) or os.access(folder, os.W_OK)):
        return
    try:
        with locked(folder) as sole:
            _settle(folder, sole)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        reason = os.strerror(error.errno)
        raise OSError(
            error.errno,
            f"{reason}: `{folder}` holds a save that was killed, and must be writable for its end. Load it once where "
            "it is writable, or save again.",
        ) from error


@contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, alone or (`shared`) with others that read; tells whether its file system has locks.

    Raises:
        BlockingIOError: Without `wait`, if somebody else holds it.
    """
    if fcntl is None:
        yield False
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # files in it may be read all the same
        if not shared:
            raise
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            sole = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            sole = False
        try:
            yield sole
        finally:
            if sole:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for children that were forked meanwhile
    finally:
        os.close(descriptor)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder for the time of the block; one that a killed process left goes with a later call."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):  # somebody's that is alive, or another user's
            if time.time() - left.lstat().st_mtime > MINUTE and not left.is_symlink():  # it may not be locked yet
                with locked(left, wait=False) as sole:
                    if sole:
                        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as name, locked(Path(name)):
        folder = Path(name) / "files"  # whose own lock is free
        folder.mkdir()
        yield folder


def _has_committed(folder: Path) -> bool:
    committed = folder / COMMITTED
    return committed.is_dir() and not committed.is_symlink()


def _prefix() -> str:
    return f"{STAGING}{socket.gethostname()}-"


def _commit(staging: Path, target: Path) -> None:
    """The one moment from which on the new files count."""
    files = list(staging.iterdir())
    if len(files) == 1 and files[0].is_file() and not files[0].name.startswith(OWN):
        os.replace(files[0], target / files[0].name)
        staging.rmdir()
    else:
        os.rename(staging, target / COMMITTED)
    _sync(target)


def _settle(target: Path, sole: bool) -> None:
    """As `finish_interrupted_save`, under the folder's lock; without one (not `sole`) nothing is cleared."""
    committed = target / COMMITTED
    if _has_committed(target):
        with suppress(FileNotFoundError):  # where nothing is locked, another process may do the same
            for path in list(committed.iterdir()):
                _move(path, target)
            inner = [path for path in target.iterdir() if path.is_dir() and not path.is_symlink()]
            for folder in filter(_has_committed, inner):
                with locked(folder) as own:
                    _settle(folder, own)
            committed.rmdir()
        _sync(target)
    for left in target.glob(f"{STAGING}*") if sole else ():
        ours = left.name.startswith(_prefix())
        with suppress(OSError):
            if ours or time.time() - left.lstat().st_mtime > DAY:
                shutil.rmtree(left, ignore_errors=True)


def _move(path: Path, target: Path) -> None:
    """Put a committed file or folder in its place."""
    place = target / path.name
    if path.name.startswith(REPLACED):
        (target / path.name.removeprefix(REPLACED)).unlink(missing_ok=True)
        path.unlink()
    elif path.is_dir() and not path.is_symlink():
        _check_no_link(place)
        place.mkdir(exist_ok=True)
        with locked(place) as sole:
            _settle(place, sole)
            os.rename(path, place / COMMITTED)  # which `_settle` of the folder above finishes
    else:
        os.replace(path, place)


def _check_replaceable(staging: Path, target: Path) -> None:
    for path in staging.iterdir():
        place = target / path.name
        if path.is_dir():
            _check_no_link(place)
        if path.is_dir() and place.is_dir():
            _check_replaceable(path, place)
        elif place.is_dir():
            raise IsADirectoryError(f"`{place}` is a folder, where a file is to be saved: move it, or save elsewhere.")
        elif path.is_dir() and place.exists():
            raise NotADirectoryError(f"`{place}` is a file, where a folder is to be saved: move it, or save elsewhere.")


def _check_no_link(place: Path) -> None:
    """Through a link, files would go to a folder that was not named."""
    if place.is_symlink():
        raise NotADirectoryError(f"`{place}` is a link, where a folder is to be saved: move it, or save elsewhere.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say of errors that a disk or its rights cause which folder it was, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number(error)
        if number not in REMEDIES:
            raise
        raise OSError(
            number,
            f"{os.strerror(number)}: nothing was saved in `{folder}`; files that it had are whole. {REMEDIES[number]}",
        ) from error


def _number(error: SafetensorError) -> int | None:
    """The number of the error of the operating system that safetensors tells in words."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
