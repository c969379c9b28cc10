"""What a card and a pushed config say of the base model: its repository on the Hub, never a path on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from memory_adapters import Covariance, load_memory
from memory_adapters.embedded_model import EMBEDDED_ID, is_embedded
from memory_adapters.files.model_card import hub_id
from tests.support.composing import put
from tests.support.contract import logits
from tests.support.models import tiny_model

METHODS = ("residual", "memit", "slots")


def loaded_from(folder: Path) -> Any:
    tiny_model().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def pushed(memory: Any, folder: Path, base_model: str | None = None) -> tuple[ModelCard, str]:
    """Return the card that would be pushed, and all text of the files beside it."""
    folder.mkdir()
    memory._write_repository(folder, base_model)
    text = "".join(file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".md"))
    return ModelCard((folder / "README.md").read_text()), text


@pytest.mark.parametrize("method", METHODS)
def test_a_local_path_is_never_pushed(method: str, tmp_path: Path) -> None:
    model = loaded_from(tmp_path / "base")
    memory = put(model, method, "facts", 1)
    assert memory is not None
    with pytest.raises(ValueError, match=r"`push_to_hub` needs `base_model='org/name'`"):
        memory.push_to_hub("me/name")
    card, text = pushed(memory, tmp_path / "pushed", "org/name")
    assert card.data.base_model == "org/name"
    assert 'AutoModelForCausalLM.from_pretrained("org/name")' in card.text
    assert (
        json.loads((tmp_path / "pushed" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"
    )
    assert str(tmp_path) not in text
    again = load_memory(tiny_model(), tmp_path / "pushed")
    assert (logits(again.model) == logits(model)).all()


@pytest.mark.parametrize("method", METHODS)
def test_saved_locally_the_config_has_the_path_and_the_card_has_not(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded_from(tmp_path / "some" / "base")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("some/base").eval()  # as a repository's name looks
    memory = put(model, method, "facts", 1)
    assert memory is not None
    memory.save_pretrained("saved")
    card = ModelCard(Path("saved/README.md").read_text())
    assert card.data.base_model is None
    assert "some/base" not in card.content
    assert " for the base model, written with" in card.text
    monkeypatch.chdir("/")
    if method != "slots":
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").to("cpu")
        assert (logits(again) == logits(model)).all()


def test_a_repository_that_is_known_needs_no_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.config._name_or_path = model.name_or_path = "org/name"
    memory = put(model, "memit", "facts", 1)
    card, _ = pushed(memory, tmp_path / "pushed")
    assert card.data.base_model == "org/name"

    monkeypatch.setenv("MEMORY_ADAPTERS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "smollm2-135m-instruct"
    assert is_embedded(folder)
    memory = put(loaded_from(folder), "memit", "facts", 1)
    card, text = pushed(memory, tmp_path / "embedded")
    assert card.data.base_model == EMBEDDED_ID
    assert f"`{EMBEDDED_ID}`" in card.text
    assert str(tmp_path) not in text

    # A memory that was saved elsewhere: the path in its config is none here.
    assert memory is not None
    memory.config.base_model_name_or_path = "/home/other/base"
    card, text = pushed(memory, tmp_path / "elsewhere")
    assert card.data.base_model == EMBEDDED_ID
    assert "/home/other" not in text


def test_a_model_without_a_name_is_pushed_without_one(tmp_path: Path) -> None:
    card, text = pushed(put(tiny_model(), "residual", "facts", 1), tmp_path / "pushed")
    assert card.data.base_model is None
    assert '"base_model_name_or_path": null' in text


def test_a_covariances_card_names_the_base_model(tmp_path: Path) -> None:
    covariance = Covariance({1: torch.eye(3)}, 5, 1, "text", {"model_type": "llama"})
    assert pushed(covariance, tmp_path / "with", "org/name")[0].data.base_model == "org/name"
    assert pushed(covariance, tmp_path / "without")[0].data.base_model is None
    for name in ("/somewhere/base", "a/b/c", ""):
        with pytest.raises(ValueError, match=r"`base_model=.*must be a repository on the Hub"):
            covariance.push_to_hub("me/c0", base_model=name)


@pytest.mark.parametrize(("name", "found"), [("org/name", True), ("gpt2", True), ("./base", False), ("~/base", False)])
def test_what_is_a_repositorys_name(name: str, found: bool) -> None:
    assert hub_id(name) == (name if found else None)
    assert hub_id(None) is None
    assert hub_id("C:/models") is None
