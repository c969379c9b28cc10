"""The messages that docs/troubleshooting.md lists are messages of the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_listed_message_is_in_the_sources() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "memory_adapters").rglob("*.py")]
    constants = {name: text for tree in trees for name, text in named(tree)}
    texts = {template(node, constants) for tree in trees for node in ast.walk(tree)}
    missing = [message for message in listed() if message not in texts]
    assert not missing, "the sources have no such message (any more)"


def test_every_message_is_listed_once() -> None:
    assert len(listed()) > 50
    assert len(listed()) == len(set(listed()))


def listed() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return [message for message in re.findall(r"^\| (.+?) \| .+ \|$", text, re.MULTILINE) if message != "message"]


def template(node: ast.AST, constants: dict[str, str]) -> str:
    """Return a text of the sources with … for what differs from case to case."""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return constants.get(node.value.id, "…") if isinstance(node.value, ast.Name) else "…"
    return str(node.value) if isinstance(node, ast.Constant) else ""


def named(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the constants of a module that are text."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from ((target.id, node.value.value) for target in node.targets if isinstance(target, ast.Name))
