"""Explain errors of full disks and of folders that cannot be written."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["REMEDIES", "explain_disk_errors"]

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free space on its disk, or save elsewhere."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make it writable, or save elsewhere."),
}


@contextmanager
def explain_disk_errors(folder: Path) -> Iterator[None]:
    """Explain in errors of the disk or its permissions that nothing was saved in `folder`, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number(error)
        if number not in REMEDIES:
            raise
        reason, remedy = os.strerror(number), REMEDIES[number]
        message = f"{reason}: nothing was saved in `{folder}`; its previous files are unchanged. {remedy}"
        raise OSError(number, message) from error


def _number(error: SafetensorError) -> int | None:
    """Return the operating system's error number, which safetensors gives in its message."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
