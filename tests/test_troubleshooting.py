"""docs/troubleshooting.md has every error and warning of loading and writing, in the words of the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # neither load nor write: their errors are in their own documentation
    *(
        "cli",
        "evaluation",
        "testing",
        "plots",
        "tracing",
        "export",
        "activation",
        "router",
        "merging",
        "embedded_model",
    ),
}


def test_every_message_is_told() -> None:
    told = set(rows())
    raised = set(messages())
    assert told - raised == set(), "the sources do not say so (any more)"
    assert raised - told == set(), "add a row to docs/troubleshooting.md, with the reason"
    assert len(rows()) == len(told)


def test_every_row_has_a_reason() -> None:
    assert all(len(reason) > 5 for reason in rows().values())


def rows() -> dict[str, str]:
    """Message to reason."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (.+?) \| (.*?) \|$", text, re.MULTILINE)
    return {message: reason for message, reason in table if message != "message"}


def messages() -> Iterator[str]:
    """What is raised or warned of, with … for what differs; without mere reasons, which stand within other messages."""
    for path in (ROOT / "memory_adapters").rglob("*.py"):
        inner = path.relative_to(ROOT / "memory_adapters")
        if not ELSEWHERE & {*inner.parts, inner.stem}:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            constants = dict(named(tree))
            for node in ast.walk(tree):
                text = template(said(node), constants)
                if text.endswith((".", "…")) and not re.fullmatch(r"…|nested deeper than …", text):
                    yield text


def said(node: ast.AST) -> ast.expr | None:
    """The message of a `raise` or `warnings.warn`."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        return node.exc.args[-1]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
        return node.args[0]
    return None


def template(node: ast.expr | None, constants: dict[str, str]) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return constants.get(node.value.id, "…") if isinstance(node.value, ast.Name) else "…"
    return str(node.value) if isinstance(node, ast.Constant) else ""


def named(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Constants of a module that are text."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from ((target.id, node.value.value) for target in node.targets if isinstance(target, ast.Name))
