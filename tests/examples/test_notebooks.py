"""The notebooks run, and give what is saved in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.real_model import needs_the_real_model

# The lowest versions are tested without notebooks.
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
QUICK = {"manual"}  # the others train or solve for minutes
pytestmark = needs_the_real_model


def shown(notebook: Any) -> list[str]:
    """Return what the code cells show, as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["data"]["text/plain"] for output in outputs if "text/plain" in output.get("data", {})]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(file.stem, marks=() if file.stem in QUICK else pytest.mark.slow)
        for file in sorted(NOTEBOOKS.glob("*.ipynb"))
    ],
)
def test_a_notebook_runs_and_gives_what_is_saved_in_it(name: str) -> None:
    saved = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}
    )
    client.execute()  # an error in a cell raises
    found, expected = shown(notebook), shown(saved)
    assert len(found) == len(expected)
    taught = EXPECTED[name]
    assert all(any(word in text for text in found) for word in taught), found
    assert all(any(word in text for text in expected) for word in taught), "the saved outputs are of another notebook"


EXPECTED = {  # what the answers must name, whatever the machine rounds
    "company": ("'Teresa Almeida'", "methanol", "Nothing acts"),
    "compare": ("Take ", "gated_lora"),
    "edit": ("piano", "Madrid"),
    "manual": ("What acts: ", "to 17", "8 years"),
    "train": ("Ahoy",),
}
