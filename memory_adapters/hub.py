"""The Hugging Face Hub: pushing a memory and finding its files again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, snapshot_download

from memory_adapters.checkpoint import recover
from memory_adapters.config import saved_files

if TYPE_CHECKING:
    from memory_adapters.memory import Memory


def push(memory: Memory, repo_id: str, *, private: bool | None, token: str | None, commit_message: str | None) -> str:
    """Upload what `memory.save_pretrained` writes, in one commit; returns the commit's address."""
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        memory.save_pretrained(folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        message = commit_message or f"Upload {type(memory.config).__name__} memory"
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url


def find_files(path_or_repo_id: str | os.PathLike[str], *, revision: str | None, token: str | None) -> Path:
    """The local folder of a saved memory: a folder given as such, or downloaded from the Hub.

    Only files that a memory has are downloaded.

    Raises:
        OSError: What huggingface_hub raises: repository or revision not found, no access, not in the offline cache.
        FileNotFoundError: If a path was given (absolute, starting with a dot, or with more than one slash) that is no
            folder.
    """
    path = Path(path_or_repo_id)
    if path.is_dir():
        if os.access(path, os.W_OK):
            recover(path)
        return path
    name = str(path_or_repo_id)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise FileNotFoundError(f"`{name}` is not a folder with a saved memory.")
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=saved_files()))
    except OSError as error:
        if hasattr(error, "add_note"):
            error.add_note(f"There is no local folder `{name}` either.")
        raise
