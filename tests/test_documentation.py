"""The documentation: the site is built without a broken link, and the snippets of its first pages run as they stand."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import memory_adapters
from tests.support.real_model import needs_the_real_model

ROOT = Path(__file__).parents[1]
BUILD = """
import sys
sys.modules["torch"] = None  # the reference is read from the source
from mkdocs.__main__ import cli
cli()
"""
LOADED = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(?:https?:)?//[^>]*>|<link[^>]*rel=["']?stylesheet[^>]*//[^>]*>"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("documentation") / "site"
    command = [sys.executable, "-c", BUILD, "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.integration
def test_the_site_is_built_without_a_broken_link(site: Path) -> None:
    assert (site / "index.html").is_file()
    assert (site / "source/tests/test_toy_method.py/index.html").is_file()  # a file outside docs/ that a page links to


@pytest.mark.integration
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    assert not [found for page in site.rglob("*.html") for found in LOADED.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.integration
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").rglob("*.html"))
    assert not [name for name in memory_adapters.__all__ if f'id="memory_adapters.{name}"' not in reference]


def snippets(page: str) -> Iterator[tuple[str, str]]:
    """Yield the code of a page in Python, and what the page says that it prints."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    yield from re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL)


def without_times(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.strip() and not line.startswith("  seconds")]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[*needs_the_real_model, pytest.mark.slow])
        for page in ("quickstart.md", "coming-from.md")
    ],
)
def test_the_snippets_print_what_the_page_shows(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code, shown in snippets(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert without_times(printed.getvalue()) == without_times(shown)
