"""The sweep over all architectures, on two of them, and the page that shows its results."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from benchmarks.common import ROOT
from benchmarks.models import METHODS, check_base, check_method, page, rows
from memory_adapters import Memory

RESULTS = json.loads((ROOT / "docs" / "results" / "models.json").read_text(encoding="utf-8"))


def test_the_page_shows_the_results():
    assert page(RESULTS) == (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.skipif(RESULTS["versions"]["transformers"] != version("transformers"), reason="another transformers")
def test_every_architecture_is_in_the_results():
    assert list(RESULTS["rows"]) == list(rows())
    assert all({"base", *METHODS} <= set(found) for found in RESULTS["rows"].values())


def test_a_memory_that_keeps_its_promises_works():
    base = check_base("llama")
    assert (base["runs"], base["cache"], base["batch"]) == (True, True, True)
    assert check_method("llama", "slots", base) == {"result": "works"}


def test_a_memory_that_leaves_something_behind_fails(monkeypatch):
    monkeypatch.setattr(Memory, "remove", lambda memory: None)
    found = check_method("llama", "slots", {"runs": True, "cache": False, "batch": False})
    assert found["result"] == "fails"
    assert found["why"].startswith("remove: ")


def test_an_encoder_decoder_is_refused():
    base = check_base("t5gemma2")
    assert not base["runs"]
    found = check_method("t5gemma2", "residual", base)
    assert found["result"] == "refused"
    assert found["why"].startswith("T5Gemma2ForConditionalGeneration is an encoder–decoder")
