"""The quickstart notebook runs, and shows what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.real_model import needs_the_real_model

# The lowest versions are tested without notebooks.
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

pytestmark = needs_the_real_model


def test_the_quickstart_notebook() -> None:
    notebook = nbformat.read(Path(__file__).parents[2] / "examples" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    asked, report, taught, off, last = [output["data"]["text/plain"] for output in outputs if "data" in output]
    assert "Paris" in asked
    assert "recalled" in report
    assert taught.count("Rome") >= 2
    assert "Paris" in off
    assert "Rome" in last
