"""Find a complete Trainer checkpoint to resume from, trained on the same data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from memory_adapters.files.strict_json import read_json

__all__ = ["check_same_data", "checkpoint_to_resume", "digest_of", "newest_checkpoint", "record_data"]

DATA_FILE = "rows.json"


def newest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the path of the newest complete checkpoint in a Trainer's `output_dir`, or None if there is none."""
    complete: dict[int, str] = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if step.isdecimal() and _is_complete(path):
            complete[int(step)] = str(path)
    return complete[max(complete)] if complete else None


def checkpoint_to_resume(resume: bool | str | None, folder: str | os.PathLike[str] | None) -> str | None:
    """Resolve `resume_from_checkpoint`: None for False, the newest complete checkpoint in `folder` for True, or a path.

    Raises:
        ValueError: If there is no complete checkpoint, or the path is none.
    """
    if not resume:
        return None
    if isinstance(resume, str):
        if not _is_complete(Path(resume)):
            raise ValueError(
                f"`resume_from_checkpoint={resume!r}` is not a Trainer checkpoint, or an incomplete one: name an "
                "earlier one, or give True for the newest complete one."
            )
        return resume
    newest = newest_checkpoint(folder) if folder is not None else None
    if newest is None:
        raise ValueError(
            f"`resume_from_checkpoint=True`, but `{folder}` has no complete checkpoint: give the `output_dir` of an "
            "earlier run, or start without it."
        )
    return newest


def digest_of(rows: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256 of rows of token ids."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def record_data(checkpoint: str | os.PathLike[str], digest: str | None) -> None:
    """Write into a checkpoint which data it was trained on."""
    (Path(checkpoint) / DATA_FILE).write_text(json.dumps({"rows_sha256": digest}), encoding="utf-8")


def check_same_data(checkpoint: str | os.PathLike[str], digest: str | None) -> None:
    """Raise a `ValueError` if a checkpoint was trained on other data."""
    path = Path(checkpoint) / DATA_FILE
    saved = read_json(path) if path.is_file() else None
    recorded = saved.get("rows_sha256") if isinstance(saved, dict) else None
    if None not in (recorded, digest) and recorded != digest:
        raise ValueError(
            f"`resume_from_checkpoint`: `{checkpoint}` was trained on other data, or with other settings: give those "
            "of that run, or start without it."
        )


def _is_complete(checkpoint: Path) -> bool:
    """Return whether the state, which Trainer writes last, can be read."""
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False
