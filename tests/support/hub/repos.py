"""Keep repositories in memory as the Hub shows them: commits, branches and tags of files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Repo", "is_large", "oid"]

LARGE = (".safetensors", ".bin", ".pkl", ".pt")  # what the Hub keeps in large-file storage


@dataclass
class Repo:
    """One model repository.

    Attributes:
        private: Whether reading needs the token.
        commits: Files of each commit by its sha, oldest commit first.
        messages: Message of each commit by its sha.
        branches: Name to sha.
        tags: Name to sha.
    """

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, changes: Mapping[str, bytes | None], branch: str = "main", message: str = "") -> str:
        """Add a commit to a branch; None deletes a file. Return its sha."""
        merged = {**self.commits.get(self.branches.get(branch, ""), {}), **changes}
        files = {path: content for path, content in merged.items() if content is not None}
        oids = sorted((path, oid(path, content)) for path, content in files.items())
        sha = hashlib.sha1(f"{len(self.commits)} {branch} {oids}".encode()).hexdigest()
        self.commits[sha], self.messages[sha] = files, message
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """Return the sha that a branch, tag or sha stands for."""
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)


def is_large(path: str) -> bool:
    """Return whether the Hub keeps a file in large-file storage."""
    return path.endswith(LARGE)


def oid(path: str, content: bytes) -> str:
    """Return the SHA-256 of a large file, or git's own hash of another."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
