"""Which of a Trainer's checkpoints can be gone on from: none that was not saved whole, and none of other rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from memory_adapters.files.strict_json import read_json

__all__ = ["check_mark", "checkpoint_to_resume", "digest_of", "mark_checkpoint", "newest_checkpoint"]

ROWS_FILE = "rows.json"


def newest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Path of the newest checkpoint in a Trainer's `output_dir` that was saved whole; None if there is none."""
    found: dict[int, str] = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if step.isdecimal() and _is_whole(path):
            found[int(step)] = str(path)
    return found[max(found)] if found else None


def checkpoint_to_resume(asked: bool | str | None, folder: str | os.PathLike[str] | None) -> str | None:
    """What `resume_from_checkpoint` stands for: nothing, the newest whole checkpoint in `folder`, or the one named.

    Raises:
        ValueError: If there is none, or the one named was not saved whole.
    """
    if not asked:
        return None
    if isinstance(asked, str):
        if not _is_whole(Path(asked)):
            raise ValueError(
                f"`resume_from_checkpoint={asked!r}` is no checkpoint of a Trainer, or one that was not saved whole: "
                "name an earlier one, or give True for the newest that is whole."
            )
        return asked
    newest = newest_checkpoint(folder) if folder is not None else None
    if newest is None:
        raise ValueError(
            f"`resume_from_checkpoint=True`, but `{folder}` has no checkpoint that was saved whole: give the "
            "`output_dir` of an earlier run, or start without it."
        )
    return newest


def digest_of(rows: Sequence[Sequence[int]]) -> str:
    """SHA-256 of rows of token ids."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def mark_checkpoint(folder: str | os.PathLike[str], rows_sha256: str | None) -> None:
    """Let a checkpoint say what it is trained on."""
    (Path(folder) / ROWS_FILE).write_text(json.dumps({"rows_sha256": rows_sha256}), encoding="utf-8")


def check_mark(checkpoint: str, rows_sha256: str | None) -> None:
    """Raise a `ValueError` if a checkpoint says that it is trained on other rows."""
    path = Path(checkpoint) / ROWS_FILE
    saved = read_json(path) if path.is_file() else None
    known = saved.get("rows_sha256") if isinstance(saved, dict) else None
    if None not in (known, rows_sha256) and known != rows_sha256:
        raise ValueError(
            f"`resume_from_checkpoint`: `{checkpoint}` is of a write of other items, or with other settings: give "
            "those of that write, or start without it."
        )


def _is_whole(checkpoint: Path) -> bool:
    """Whether the state can be read, which Trainer writes last."""
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False
