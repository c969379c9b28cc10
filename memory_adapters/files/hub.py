"""The Hugging Face Hub: pushing what can be saved, and finding its files again."""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import ClassVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock

from memory_adapters.files.atomic import MINUTE, finish_interrupted_save, scratch_folder
from memory_adapters.files.disk_errors import REMEDIES
from memory_adapters.files.model_card import HERE
from memory_adapters.files.names import CARD_FILE
from memory_adapters.files.strict_json import file_in
from memory_adapters.registry import saved_file_names

__all__ = ["OnHub", "OneFile", "find_file", "find_files"]

MEMORY_FILE = "adapter_config.json"  # every saved memory has it


class OnHub(ABC):
    """What can be pushed to a repository on the Hub."""

    @abstractmethod
    def _write_repository(self, folder: Path) -> None:
        """Write the repository's files into an empty folder; the card among them holds `HERE` for its address."""

    def _left_out(self, api: HfApi, repo_id: str, revision: str | None) -> list[str]:
        """Files of `_write_repository` that must not replace those in the repository."""
        return []

    def _replaced(self) -> list[str]:
        """Files in the repository that go if they are not written again."""
        return []

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Save to the Hub in one commit, with a model card; makes the repository if need be.

        Until that commit is made, the repository shows what it showed before: after an error, push again.

        Args:
            repo_id: `"user/name"`.
            private: Visibility of a new repository, None for the account's default; one that exists keeps its own.
            token: Access token; None for the one logged in.
            commit_message: Message of the commit.
            revision: Branch to push to, made from the default branch if it does not exist, or a pull request's
                `"refs/pr/1"`; None for the default branch.

        Returns:
            The commit's address.

        Raises:
            OSError: What huggingface_hub raises (no access, no such name), or a `ConnectionError` if the connection
                broke more often than it tries again.
        """
        api = HfApi(token=token)
        remedy = "The repository shows its latest commit whole: push again."
        with scratch_folder() as folder:
            self._write_repository(folder)
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
    """What one safetensors file holds, beside or without a memory.

    Attributes:
        file: The file's name in a repository.
    """

    file: ClassVar[str]

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""

    @abstractmethod
    def _card(self) -> str:
        """The model card."""

    def _write_repository(self, folder: Path) -> None:
        self.save(folder / self.file)
        (folder / CARD_FILE).write_text(self._card(), encoding="utf-8")

    def _left_out(self, api: HfApi, repo_id: str, revision: str | None) -> list[str]:
        """Beside a memory, the card is the memory's."""
        return [CARD_FILE] if api.file_exists(repo_id, MEMORY_FILE, revision=revision) else []


def find_files(
    path_or_repo_id: str | os.PathLike[str],
    *,
    revision: str | None,
    token: str | None,
    names: Sequence[str] | None = None,
) -> Path:
    """The local folder of what was saved: a folder given as such, or downloaded from the Hub.

    Args:
        path_or_repo_id: A folder, or a repository on the Hub.
        revision: Branch, tag or commit on the Hub.
        token: Access token for the Hub.
        names: Which files are downloaded; by default those that a memory has.

    Raises:
        OSError: What huggingface_hub raises: repository or revision not found, no access, not in the offline cache. A
            `ConnectionError` if the connection broke. With the cache's name if its disk is full or not writable.
        FileNotFoundError: If a path was given (absolute, starting with a dot, or with more than one slash) that is no
            folder.
        ValueError: If a revision was given of what is a local folder.
    """
    path = Path(path_or_repo_id)
    if path.is_dir():
        _check_local(path, revision)
        finish_interrupted_save(path)
        return path
    name = str(path_or_repo_id)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise FileNotFoundError(f"`{name}` is not a folder with {'a saved memory' if names is None else names[0]}.")
    patterns = list(saved_file_names() if names is None else names)
    try:
        with _connected(f"downloading from `{name}`", "Nothing half downloaded is kept: load again."):
            return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
    except OSError as error:
        if error.errno in REMEDIES:
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}: `{name}` cannot be kept in the Hub's cache, `{constants.HF_HUB_CACHE}`. "
                "Free space on its disk, make it writable, or set HF_HOME to another folder.",
            ) from error
        if hasattr(error, "add_note"):
            error.add_note(f"There is no local folder `{name}` either.")
        raise
    finally:
        _clear_unfinished(Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model"))


def find_file(path_or_repo_id: str | os.PathLike[str], name: str, *, revision: str | None, token: str | None) -> Path:
    """The local path of a file: given as such, `name` in a folder, or `name` downloaded from the Hub.

    Raises:
        OSError: As `find_files`.
        FileNotFoundError: If there is no such file. What ends as `name` does is a file, not a repository.
    """
    path = Path(path_or_repo_id)
    if path.parent.is_dir():
        finish_interrupted_save(path.parent)
    if path.is_file():
        _check_local(path, revision)
        return path
    if path.suffix == Path(name).suffix:
        raise FileNotFoundError(f"`{path}` does not exist: give a saved file, or a repository on the Hub.")
    folder = find_files(path_or_repo_id, revision=revision, token=token, names=[name])
    if not (folder / name).is_file():
        raise FileNotFoundError(f"`{path_or_repo_id}` has no {name}.")
    return file_in(folder, name)


def _check_local(path: Path, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(
            f"`revision={revision!r}` is of a repository on the Hub, and `{path}` is here: leave it out, or rename "
            "what is here to load the repository."
        )


def _clear_unfinished(repository: Path) -> None:
    """Clear what killed and broken downloads left in the Hub's cache of a repository."""
    for left in repository.glob("blobs/*.incomplete"):
        lock = repository.parent / ".locks" / repository.name / f"{left.name.partition('.')[0]}.lock"
        with suppress(OSError), WeakFileLock(lock, timeout=0.1):  # a download that is alive holds it
            left.unlink()
    for left in chain.from_iterable(repository.glob(name) for name in ("tmp*", "blobs/tmp*", "trees/*.tmp")):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > MINUTE:  # it is there for an instant
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def _connected(doing: str, remedy: str) -> Iterator[None]:
    """Raise as an `OSError` what huggingface_hub lets through or wraps when a connection breaks: its client's error."""
    try:
        yield
    except (HTTPError, RuntimeError) as error:
        reason = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(error, OSError) or not isinstance(reason, HTTPError):
            raise
        if isinstance(reason, OSError):
            raise reason from reason.__cause__
        raise ConnectionError(f"The connection to the Hub broke while {doing} ({reason}). {remedy}") from error
