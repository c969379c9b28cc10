"""Which of a Trainer's checkpoints can be gone on from: one that was being saved when its process was killed cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

__all__ = ["checkpoint_to_resume", "newest_checkpoint"]


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


def _is_whole(checkpoint: Path) -> bool:
    """Whether the state can be read, which Trainer writes last."""
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False
