"""Push saved files to the Hugging Face Hub, and download them."""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, cast

from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock
from typing_extensions import Self

from memory_adapters.files.atomic import MINUTE, finish_interrupted_save, read_lock, scratch_folder
from memory_adapters.files.disk_errors import REMEDIES
from memory_adapters.files.model_card import HERE, hub_id
from memory_adapters.files.names import CARD_FILE
from memory_adapters.files.strict_json import file_in
from memory_adapters.registry import loaded_file_names
from memory_adapters.validation import check_path

__all__ = ["OnHub", "OneFile", "find_adapters", "find_file", "find_files"]

MEMORY_FILE = "adapter_config.json"  # every saved memory has it


class OnHub(ABC):
    """Push to a repository on the Hub: the base of what can be pushed."""

    @abstractmethod
    def _write_repository(self, folder: Path, base_model: str | None = None) -> None:
        """Write the repository's files into an empty folder; the card has `HERE` in place of its address.

        `base_model` is the base model's repository, if the user names one.
        """

    def _left_out(self, api: HfApi, repo_id: str, revision: str | None) -> list[str]:
        """Return patterns of files that `_write_repository` writes but that are not pushed."""
        return []

    def _replaced(self) -> list[str]:
        """Return patterns of files that are deleted in the repository unless they are pushed again."""
        return []

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        base_model: str | None = None,
    ) -> str:
        """Push to the Hub in one commit, with a model card. The repository is made if it does not exist.

        After an error the repository is as it was before: push again.

        Args:
            repo_id: The repository, as `"user/name"`.
            private: Whether a new repository is private; by default as the account says.
            token: Access token; by default that of the login.
            commit_message: Message of the commit.
            revision: Branch to push to, made from the default branch if it does not exist, or a pull request such as
                `"refs/pr/1"`; by default the default branch.
            base_model: The base model's repository on the Hub, for the card and the config of a memory; by default
                the one that it was loaded from. Paths on this machine are not pushed.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: If `base_model` is no repository's name, or is needed: a memory's base model was loaded from a
                local folder. Nothing is pushed then.
            OSError: What huggingface_hub raises (no access, no such name), or a `ConnectionError` if the connection
                breaks and huggingface_hub gives up.
        """
        if base_model is not None and hub_id(base_model) is None:
            raise ValueError(f"`base_model={base_model!r}` must be a repository on the Hub, such as 'org/name'.")
        api = HfApi(token=token)
        remedy = "The repository is unchanged: push again."
        with scratch_folder() as folder:
            self._write_repository(folder, base_model)
            with _connected(f"pushing to `{repo_id}`", remedy):
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if revision is not None and not revision.startswith("refs/"):
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                address = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
                card = folder / CARD_FILE
                card.write_text(card.read_text(encoding="utf-8").replace(f'"{HERE}"', address), encoding="utf-8")
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message or f"Upload {type(self).__name__}",
                    ignore_patterns=self._left_out(api, repo_id, revision),
                    delete_patterns=self._replaced() or None,
                ).commit_url


class OneFile(OnHub):
    """Save as one safetensors file, in a repository of its own or beside a memory: the base of what is saved so.

    Attributes:
        file: The file's name in a repository.
    """

    file: ClassVar[str]

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file atomically."""

    @classmethod
    def load(
        cls, path_or_repo_id: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> Self:
        """Read what `save` or `push_to_hub` wrote.

        Args:
            path_or_repo_id: A file, a folder that has it by the name it has on the Hub (the class's `file`), or a
                repository on the Hub.
            revision: Branch, tag or commit on the Hub.
            token: Access token for the Hub.

        Raises:
            FileNotFoundError: If there is no such file, or none in the folder or repository.
            OSError: What huggingface_hub raises if the repository or revision cannot be had.
            ValueError: If the file is damaged, or holds something else.
        """
        path = find_file(path_or_repo_id, cls.file, revision=revision, token=token)
        with read_lock(path.parent):  # its header and its tensors are of one save
            return cls._read(path)

    @classmethod
    @abstractmethod
    def _read(cls, path: Path) -> Self:
        """Read the file; raises a `ValueError` if it is damaged or holds something else."""

    @abstractmethod
    def _card(self) -> str:
        """Return the model card."""

    def _write_repository(self, folder: Path, base_model: str | None = None) -> None:
        self.save(folder / self.file)
        card = ModelCard(self._card())
        cast(ModelCardData, card.data).base_model = base_model
        (folder / CARD_FILE).write_text(str(card), encoding="utf-8")

    def _left_out(self, api: HfApi, repo_id: str, revision: str | None) -> list[str]:
        """Keep the card of a memory in the same repository."""
        return [CARD_FILE] if api.file_exists(repo_id, MEMORY_FILE, revision=revision) else []


def find_files(
    path_or_repo_id: str | os.PathLike[str],
    *,
    revision: str | None,
    token: str | None,
    names: Sequence[str] | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return a local folder with saved files, downloaded from the Hub unless the folder itself is given.

    Args:
        path_or_repo_id: A folder, or a repository on the Hub.
        revision: Branch, tag or commit on the Hub.
        token: Access token for the Hub.
        names: The files to download; by default those of a memory.
        subfolder: A folder inside that folder or repository; only files in it are downloaded.
        cache_dir: Where downloads are kept; by default the Hub's cache.
        local_files_only: Whether to use only what was downloaded before.

    Raises:
        OSError: What huggingface_hub raises: repository or revision not found, no access, not downloaded before. A
            `ConnectionError` if the connection broke. If the disk of the cache is full or not writable, with its name.
        FileNotFoundError: If a path (absolute, starting with a dot, or with more than one slash) is not a folder, or
            there is no such subfolder.
        ValueError: If `revision` is given for a local folder, or `subfolder` leads out of the folder.
    """
    check_path("path_or_repo_id", path_or_repo_id)
    inner = _parts(subfolder)
    path, name = Path(path_or_repo_id), str(path_or_repo_id)
    if path.is_dir():
        _check_local(path, revision)
        finish_interrupted_save(path)
        return _inside(path, inner, name)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise FileNotFoundError(f"`{name}` is not a folder with {'a saved memory' if names is None else names[0]}.")
    patterns = ["/".join([*map(escape, inner), file]) for file in names or loaded_file_names()]
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    options: dict[str, Any] = dict(revision=revision, token=token, cache_dir=cache, local_files_only=local_files_only)
    try:
        with _connected(f"downloading from `{name}`", "What was downloaded in part is not used: load again."):
            return _inside(Path(snapshot_download(name, allow_patterns=patterns, **options)), inner, name)
    except OSError as error:
        if error.errno in REMEDIES:
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}: `{name}` cannot be kept in the Hub's cache, `{cache}`. Free space on its "
                "disk, make it writable, or set `cache_dir` or HF_HOME to another folder.",
            ) from error
        if isinstance(error, LocalEntryNotFoundError):  # which does not say of what
            raise LocalEntryNotFoundError(
                f"`{name}` is no folder here, and could not be downloaded from the Hub: check its spelling. ({error})"
            ) from error
        if hasattr(error, "add_note"):
            error.add_note(f"There is no local folder `{name}` either.")
        raise
    finally:
        _clear_unfinished(cache / repo_folder_name(repo_id=name, repo_type="model"))


def find_adapters(
    path_or_repo_id: str | os.PathLike[str],
    index: str,
    read_index: Callable[[Path], Sequence[str]],
    *,
    revision: str | None,
    **options: Any,
) -> Path:
    """Return a local folder with an index and a subfolder for each adapter in it, downloaded from the Hub if need be.

    Args:
        path_or_repo_id: A folder, or a repository on the Hub.
        index: The index's file name.
        read_index: Reads the names of the subfolders from the index.
        revision: Branch, tag or commit on the Hub.
        options: Other arguments of `find_files`, but for `names`.

    Raises:
        OSError, ValueError: As `find_files` and `read_index`.
    """
    folder = find_files(path_or_repo_id, revision=revision, names=[index], **options)
    if not Path(path_or_repo_id).is_dir() and (folder / index).is_file():
        commit = [folder, *folder.parents][len(_parts(options.get("subfolder")))].name  # the snapshot's
        files = [
            f"{escape(name)}/{file}" for name in read_index(file_in(folder, index)) for file in loaded_file_names()
        ]
        find_files(path_or_repo_id, revision=commit, names=[index, *files], **options)
    return folder


def find_file(
    path_or_repo_id: str | os.PathLike[str],
    name: str,
    *,
    revision: str | None,
    token: str | None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the local path of a file: the one given, `name` in a folder, or `name` downloaded from the Hub.

    Args:
        path_or_repo_id: The file, a folder, or a repository on the Hub.
        name: The file's name in a folder or repository. A path with its suffix is a file, not a repository.
        revision, token, subfolder, cache_dir, local_files_only: As `find_files`.

    Raises:
        OSError, ValueError: As `find_files`.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path_or_repo_id)
    if path.parent.is_dir():
        finish_interrupted_save(path.parent)
    if path.is_file():
        _check_local(path, revision)
        if subfolder is not None:
            raise ValueError(f"`subfolder={subfolder!r}` was given, but `{path}` is a file: give its folder.")
        return path
    if path.suffix == Path(name).suffix:
        raise FileNotFoundError(f"`{path}` does not exist: give a saved file, or a repository on the Hub.")
    options: dict[str, Any] = dict(subfolder=subfolder, cache_dir=cache_dir, local_files_only=local_files_only)
    folder = find_files(path_or_repo_id, revision=revision, token=token, names=[name], **options)
    if not (folder / name).is_file():
        raise FileNotFoundError(f"`{path_or_repo_id}` has no {'/'.join([*_parts(subfolder), name])}.")
    return file_in(folder, name)


def _parts(subfolder: str | None) -> list[str]:
    """Return the names of the folders that lead to a subfolder."""
    parts = [] if subfolder is None else subfolder.removesuffix("/").split("/")
    if any(part in ("", ".", "..") or "\\" in part or ":" in part or not part.isprintable() for part in parts):
        raise ValueError(f"`subfolder={subfolder!r}` must be the path of a folder inside the one given, such as 'a/b'.")
    return parts


def _inside(folder: Path, parts: Sequence[str], given: str) -> Path:
    """Return the folder inside another that these names lead to."""
    found = folder.joinpath(*parts)
    if parts and not found.is_dir():
        raise FileNotFoundError(f"`{given}` has no folder `{'/'.join(parts)}`.")
    if found.resolve() != folder.resolve().joinpath(*parts):
        raise ValueError(f"`{found}` is a link out of its folder: put a copy of what it links to there.")
    return found


def _check_local(path: Path, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(
            f"`revision={revision!r}` is for a repository on the Hub, but `{path}` is local: leave it out, or rename "
            "the local one to load the repository."
        )


def _clear_unfinished(repository: Path) -> None:
    """Delete what killed and broken downloads of a repository left in the Hub's cache."""
    for left in repository.glob("blobs/*.incomplete"):
        lock = repository.parent / ".locks" / repository.name / f"{left.name.partition('.')[0]}.lock"
        with suppress(OSError), WeakFileLock(lock, timeout=0.1):  # a running download holds it
            left.unlink()
    for left in chain.from_iterable(repository.glob(name) for name in ("tmp*", "blobs/tmp*", "trees/*.tmp")):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > MINUTE:  # a running download has it for an instant
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def _connected(doing: str, remedy: str) -> Iterator[None]:
    """Raise an `OSError` when a connection breaks; huggingface_hub raises or wraps the error of its HTTP client."""
    try:
        yield
    except (HTTPError, RuntimeError) as error:
        reason = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(error, OSError) or not isinstance(reason, HTTPError):
            raise
        if isinstance(reason, OSError):
            raise reason from reason.__cause__
        raise ConnectionError(f"The connection to the Hub broke while {doing} ({reason}). {remedy}") from error
