"""Closed-form editing on bad input and interruptions: named, and nothing changed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import Covariance, CovarianceFitter, Fact, MemitConfig, inject_memory, load_memory
from tests.memit.test_write import FACTS, SMALL, memory_on
from tests.support.contract import fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model


@pytest.mark.parametrize("stage", ["keep_before", "find_targets", "subject_keys"])
def test_an_interrupted_write_changes_nothing(stage: str) -> None:
    model = tiny_model()
    memory = memory_on(model)
    memory.write(FACTS[:1], progress=False)
    with_memory, before, facts = logits(model), fingerprint(model), memory.items
    calls = itertools.count()

    def interrupt(*_args: Any, **_kwargs: Any) -> Any:
        next(calls)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"memory_adapters.memit.write.{stage}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            memory.write(FACTS[1:], progress=False)
    assert next(calls) == 1
    assert torch.equal(logits(model), with_memory)
    assert fingerprint(model) == before
    assert memory.items == facts
    memory.write(FACTS[1:], progress=False)


def test_bad_input_is_named_before_anything_changes() -> None:
    model = tiny_model()
    memory = memory_on(model)
    base = logits(model)
    with pytest.raises(ValueError, match=r"items\[1\].*512"):
        memory.write([FACTS[0], Fact("A x is", "x", "y" * 600)], progress=False)
    with pytest.raises(ValueError, match="tokenizer"):
        inject_memory(tiny_model(), MemitConfig(**SMALL)).write(FACTS)
    with pytest.raises(ValueError, match="`layers` has 9"):
        memory_on(tiny_model(), layers=[9])
    other = tiny_model(seed=3)
    foreign = CovarianceFitter(other, byte_tokenizer(), [1, 2]).sample(300, progress=False).covariance()
    with pytest.raises(ValueError, match="another base model"):
        memory.write(FACTS, covariance=foreign, progress=False)
    wrong = CovarianceFitter(model, byte_tokenizer(), [0, 1]).sample(300, progress=False).covariance()
    with pytest.raises(ValueError, match=r"layers \[0, 1\], but block 2"):
        memory.write(FACTS, covariance=wrong, progress=False)
    few = CovarianceFitter(model, byte_tokenizer(), [1, 2]).fit(["few"], 3, progress=False).covariance()
    with pytest.raises(ValueError, match="singular"):
        memory_on(model, shrinkage=0.0).write(FACTS, covariance=few, progress=False)
    nan = Covariance({i: m * float("nan") for i, m in wrong.matrices.items()} | {2: wrong.matrices[1] * float("nan")},
                     300, 1, "", memory.config.base_fingerprint or {})  # fmt: skip
    with pytest.raises(ValueError, match="NaN"):
        memory.write(FACTS, covariance=nan, progress=False)
    assert torch.equal(logits(model), base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        memory.write(FACTS, progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", "all"),
        ("solver", "rome"),
        ("regularization", 0),
        ("null_space", 1.5),
        ("steps", 0),
        ("learning_rate", -1),
        ("clamp", 0),
        ("target_loss", -1),
        ("kl_factor", "much"),
        ("weight_decay", -1),
        ("num_prefixes", 1.5),
        ("prefix_length", 0),
        ("chat", 1),
        ("precision", "float8"),
        ("covariance_tokens", 0),
        ("shrinkage", 2),
        ("batch_tokens", 0),
        ("seed", -1),
        ("items", [{"prompt": "a", "subject": 3, "target": "b"}]),
        ("items", ["a"]),
        ("items", {"prompt": "a"}),
    ],
)
def test_bad_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}`"):
        MemitConfig(**{field: value})


def test_damaged_ledgers_are_refused(tmp_path: Path) -> None:
    memory = memory_on(tiny_model())
    memory.write(FACTS[:2], progress=False)
    memory.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "memory_config.json").read_text())
    model = tiny_model()
    base, before = logits(model), fingerprint(model)
    damages: list[tuple[str, Any]] = [
        ("items", settings["items"][:1]),
        ("items", [{"prompt": "", "subject": "", "target": ""}] * 2),
        ("items", "everything"),
        ("layers", [1, 3]),
        ("solver", "none"),
        ("unknown", 1),
        ("peft_type", "LORA"),
    ]
    for field, value in damages:
        (tmp_path / "memory_config.json").write_text(json.dumps({**settings, field: value}))
        with pytest.raises(ValueError):  # noqa: PT011 (each says something else)
            load_memory(model, tmp_path, tokenizer=byte_tokenizer())
    (tmp_path / "memory_config.json").write_text(json.dumps(settings))
    data = bytearray((tmp_path / "ledger.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "ledger.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="was changed after it was saved"):
        load_memory(model, tmp_path, tokenizer=byte_tokenizer())
    (tmp_path / "ledger.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"ledger\.safetensors"):
        load_memory(model, tmp_path, tokenizer=byte_tokenizer())
    assert torch.equal(logits(model), base)
    assert fingerprint(model) == before


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    memory = memory_on(tiny_model())
    memory.write(FACTS[:2], progress=False)
    for folder in ("a", "b"):
        memory.save_pretrained(tmp_path / folder)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
