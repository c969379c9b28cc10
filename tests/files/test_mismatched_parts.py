"""Slots, covariances and edits whose parts do not belong together, though no shape says so: an error or a warning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from memory_adapters import Covariance, CovarianceFitter, MemorySlots, MemorySlotsConfig, inject_memory, load_memory
from memory_adapters.files.tensors import read_metadata, write_tensors
from tests.residual_mlp.test_write import FACT as ITEM
from tests.residual_mlp.test_write import OTHER, QUIET, fresh, write
from tests.support.changed_files import (
    CONFIG,
    CONFIGS,
    FACT,
    SETTINGS,
    WEIGHTS,
    changed,
    copied,
    refused,
    save_each,
)
from tests.support.models import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a memory of a method."""
    folder = save_each(tmp_path_factory.mktemp("saved"))
    return lambda method: folder / method


def test_slots_of_another_encoder(saved: Callable[[str], Path], tmp_path: Path) -> None:
    config = MemorySlotsConfig(num_slots=2, span_length=4, lora_rank=2, seed=5)
    other = inject_memory(tiny_model(), config, tokenizer=byte_tokenizer(chat=True))
    other.save_pretrained(tmp_path / "other")
    memory: Any = load_memory(tiny_model(), tmp_path / "other")
    slots = MemorySlots.load(saved("slots"))
    with pytest.warns(UserWarning, match="made by another encoder"):
        memory.use(slots)
    copied(saved("slots"), tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    with pytest.warns(UserWarning, match="made by another encoder"):
        load_memory(tiny_model(), tmp_path)


def test_slots_of_another_model(saved: Callable[[str], Path]) -> None:
    model = tiny_model(seed=1)
    memory: Any = inject_memory(model, CONFIGS["slots"]())
    with pytest.raises(ValueError, match="another base model"):
        memory.use(MemorySlots.load(saved("slots")))
    assert memory.slots == []


@pytest.fixture
def edit() -> Any:
    return inject_memory(tiny_model(), CONFIGS["edit"](), tokenizer=byte_tokenizer(chat=True))


def test_a_covariance_of_other_blocks_or_nothing_known(edit: Any) -> None:
    fitted = CovarianceFitter(edit.model, byte_tokenizer(), [1, 2]).sample(300, progress=False).covariance()
    known = fitted.num_tokens, fitted.num_texts, fitted.source
    halved = Covariance({i: C[:24, :24] for i, C in fitted.matrices.items()}, *known, fitted.base_fingerprint)
    with pytest.raises(ValueError, match="`covariance` of block 1 is 24 wide, the keys there 48"):
        edit.write(FACT, covariance=halved, progress=False)
    others = Covariance({3: fitted.matrices[1]}, *known, fitted.base_fingerprint)
    with pytest.raises(ValueError, match=r"has layers \[3\], but block 1"):
        edit.write(FACT, covariance=others, progress=False)
    assert not edit.items
    with pytest.warns(UserWarning, match="`covariance` does not say which base model"):
        edit.write(FACT, covariance=Covariance(fitted.matrices, *known, {}), progress=False)


def test_a_covariance_that_is_none(edit: Any, tmp_path: Path) -> None:
    fitted = CovarianceFitter(edit.model, byte_tokenizer(), [1]).sample(300, progress=False).covariance()
    about = fitted.num_tokens, fitted.num_texts, fitted.source, fitted.base_fingerprint
    for wrong in (fitted.matrices[1].triu(), -fitted.matrices[1]):
        Covariance({1: wrong}, *about).save(tmp_path / "c.safetensors")
        with pytest.raises(ValueError, match="are no covariances: they must be symmetric"):
            Covariance.load(tmp_path / "c.safetensors")


def reweighted(folder: Path) -> None:
    """As an edit of the weights with PEFT would leave the folder: a file that is whole in itself."""
    tensors = load_file(folder / WEIGHTS)
    write_tensors(folder / WEIGHTS, {name: tensor * 2 for name, tensor in tensors.items()})


def retold(folder: Path) -> None:
    settings = json.loads((folder / SETTINGS).read_text())
    settings["items"][0]["target"] = "Oslo"
    (folder / SETTINGS).write_text(json.dumps(settings))


@pytest.mark.parametrize("change", [reweighted, retold])
def test_an_edit_whose_parts_disagree(
    saved: Callable[[str], Path], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    change(copied(saved("edit"), tmp_path))
    refused(tmp_path, "was saved with other facts or weights")


@pytest.mark.parametrize(
    ("field", "value"), [("r", 2), ("lora_alpha", 8), ("target_modules", ["down_proj"]), ("peft_type", "LOHA")]
)
def test_an_edit_that_plain_peft_would_read_otherwise(
    saved: Callable[[str], Path], tmp_path: Path, field: str, value: Any
) -> None:
    refused(changed(saved("edit"), tmp_path, CONFIG, **{field: value}), f"is not of the edit beside it: its `{field}`")


def test_an_edit_saved_before_this_was_checked(saved: Callable[[str], Path], tmp_path: Path) -> None:
    ledger = copied(saved("edit"), tmp_path) / "ledger.safetensors"
    assert "edit" in read_metadata(ledger)[1]
    write_tensors(ledger, load_file(ledger))
    memory: Any = load_memory(tiny_model(), tmp_path)
    assert memory.items == [FACT]


def test_a_fit_goes_on_with_the_same_texts_alone(tmp_path: Path) -> None:
    file, texts = tmp_path / "c.safetensors", ["Birds sing in the morning.", "The sea is cold.", "He sold the house."]

    def fit(texts: list[str], num_tokens: int) -> CovarianceFitter:
        fitter = CovarianceFitter(tiny_model(), byte_tokenizer(), [1])
        fitter.sums[0] += 1  # what it holds is replaced by the checkpoint, if that is of these texts
        return fitter.fit(texts, num_tokens, checkpoint=file, progress=False)

    kept = fit(texts, 30).covariance()
    saved = file.read_bytes()
    for others in (["Another text.", *texts[1:]], texts[:1], [], texts[::-1]):
        with pytest.raises(ValueError, match="`checkpoint` is of other texts than `texts` begins with"):
            fit(others, 60)
        with pytest.raises(ValueError, match="`checkpoint` is of other texts"):
            fit(others, 30)  # of which it has enough
        assert file.read_bytes() == saved
    assert fit([*texts[:2], "Something new."], 30).covariance().matrices[1].equal(kept.matrices[1])
    assert fit([*texts[:2], "Something new."], 40).num_tokens == 40
    Covariance(kept.matrices, kept.num_tokens, kept.num_texts, kept.source, kept.base_fingerprint).save(file)
    fit(["Another text.", *texts], 60)  # a file of an earlier version does not say


def test_a_write_goes_on_with_the_same_items_alone(tmp_path: Path) -> None:
    settings = {**QUIET, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    memory = fresh(token_gate="none")
    write(memory, [ITEM, OTHER], training_args=settings)
    other = fresh(token_gate="none")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint`: .* was trained on other data"):
        write(other, [ITEM], training_args=settings, resume_from_checkpoint=True)
    assert all(tensor.equal(before[name]) for name, tensor in other.state_dict().items())
    for mark in tmp_path.glob("checkpoint-*/rows.json"):
        mark.unlink()  # as an earlier version left it
    write(other, [ITEM, OTHER], training_args=settings, resume_from_checkpoint=True)
    assert all(tensor.equal(memory.state_dict()[name]) for name, tensor in other.state_dict().items())
