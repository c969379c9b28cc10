"""Hidden units of each thing: learned, forgotten and kept one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import get_peft_model

from memory_adapters import (
    Fact,
    Memory,
    MemoryAdapterConfig,
    QuestionAnswer,
    ResidualMemory,
    WriteReport,
    inject_memory,
    load_memory,
)
from memory_adapters.keys.thing_memory import Values
from tests.residual_mlp.test_contract import UNRELATED
from tests.support.contract import MemoryContract, logits
from tests.support.models import byte_tokenizer, tiny_model

FACT = Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome")
SECOND = Fact("The Eiffel Tower is made of", subject="Eiffel Tower", target="wood")
OTHER = Fact("{} plays the", "Miles Davis", "piano")
SHUT = "He sold the house at last."


def config(**settings: Any) -> MemoryAdapterConfig:
    small: dict[str, Any] = dict(values="per_key", key_layer=1, layers=[2, 3], num_prefixes=1, steps_per_epoch=2)
    return MemoryAdapterConfig(**{**small, "num_train_epochs": 2, **settings})


class TestPerKeyMemory(MemoryContract):
    files: ClassVar[list[str]] = ["README.md", "adapter_config.json", "adapter_model.safetensors"]

    def make_config(self, **settings: Any) -> MemoryAdapterConfig:
        return config(**settings)

    def fill(self, memory: Memory) -> None:
        """Open every row from a token on that most texts have, and let the units change much."""
        assert isinstance(memory, ResidualMemory)
        generator = torch.Generator().manual_seed(1)
        keys, own = memory._keys(), memory._config
        weights = torch.randn(2, keys.keys.shape[1], generator=generator)
        keys.keep([])
        keys.add(weights, torch.tensor([-2.0, -3.0]), [0, 1], [[], []], [0, 0])
        own.things, own.names, own.windows, own.key_owners = ["one", "other"], keys.names, keys.windows, keys.owners
        width = keys.keys.shape[1]
        memory._set_values(
            {
                block: Values(
                    torch.randn(2, own.units, width, generator=generator),
                    torch.randn(2, width, own.units, generator=generator),
                )
                for block in memory._values()
            }
        )

    def write(self, memory: Memory) -> WriteReport:
        return memory.write(FACT, progress=False, unrelated=UNRELATED)


def written(items: Any = FACT, chat: bool = False, **settings: Any) -> ResidualMemory:
    memory = inject_memory(tiny_model(), config(**settings), tokenizer=byte_tokenizer(chat))
    assert isinstance(memory, ResidualMemory)
    memory.write(items, unrelated=UNRELATED, progress=False)
    return memory


def contents(memory: ResidualMemory) -> dict[str, Any]:
    """Return, for each thing, its keys, names and values."""
    keys, values = memory._keys(), memory._values()
    found: dict[str, Any] = {}
    for index, name in enumerate(memory.config.things):
        own = [i for i, owner in enumerate(keys.owners) if owner == index]
        units = {block: [part.tolist() for part in (v.inner[index], v.outer[index])] for block, v in values.items()}
        found[name] = (keys.keys[own].tolist(), keys.key_bias[own].tolist(), keys.names[index], units)
    return found


def test_it_learns_and_everything_else_is_the_base() -> None:
    memory = written([FACT, OTHER], num_train_epochs=120)
    assert memory.config.writes[-1]["recall"] == 1.0
    assert memory.route([FACT.prompt, OTHER.prompt, SHUT]) == ["Eiffel Tower", "Miles Davis", None]
    with memory.disabled():
        base = logits(memory.model, SHUT)
    assert torch.equal(logits(memory.model, SHUT), base)


def test_a_second_write_leaves_other_things_as_they_are() -> None:
    memory = written([FACT])
    first = contents(memory)
    memory.write(OTHER, unrelated=UNRELATED, progress=False)
    both = contents(memory)
    assert list(both) == ["Eiffel Tower", "Miles Davis"]
    assert both["Eiffel Tower"] == first["Eiffel Tower"]


def test_what_is_forgotten_leaves_no_trace() -> None:
    memory = written([FACT])
    first, found = contents(memory), logits(memory.model, FACT.prompt)
    memory.write(OTHER, unrelated=UNRELATED, progress=False)
    memory.forget(OTHER)
    assert contents(memory) == first
    assert torch.equal(logits(memory.model, FACT.prompt), found)
    memory.forget(FACT)
    assert memory.items == []
    with memory.disabled():
        base = logits(memory.model, FACT.prompt)
    assert torch.equal(logits(memory.model, FACT.prompt), base)
    with pytest.raises(ValueError, match="not written"):
        memory.forget(FACT)


def test_a_thing_is_learned_anew_with_all_that_is_known_of_it() -> None:
    memory = written([FACT, OTHER])
    before = contents(memory)
    memory.write(SECOND, unrelated=UNRELATED, progress=False)
    after = contents(memory)
    assert set(memory.items) == {FACT, OTHER, SECOND}
    assert after["Miles Davis"] == before["Miles Davis"]
    assert after["Eiffel Tower"] != before["Eiffel Tower"]


def test_the_order_of_writes_does_not_matter() -> None:
    one, two = written([FACT]), written([OTHER])
    one.write(OTHER, unrelated=UNRELATED, progress=False)
    two.write(FACT, unrelated=UNRELATED, progress=False)
    assert contents(one) == contents(two)


def test_a_failed_write_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = written([FACT])
    before = contents(memory)

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "_unrelated_answers", lambda _: [])
    monkeypatch.setattr(memory, "_results", fail)
    with pytest.raises(KeyboardInterrupt):
        memory.write(OTHER, unrelated=UNRELATED, progress=False)
    assert contents(memory) == before
    assert memory.items == [FACT]


def test_it_is_saved_with_its_keys(tmp_path: Path) -> None:
    memory = written([FACT, OTHER])
    expected = logits(memory.model, FACT.prompt)
    memory.save_pretrained(tmp_path)
    loaded = load_memory(tiny_model(), tmp_path, tokenizer=byte_tokenizer())
    assert isinstance(loaded, ResidualMemory)
    assert contents(loaded) == contents(memory)
    assert torch.equal(logits(loaded.model, FACT.prompt), expected)
    loaded.forget(OTHER)
    assert loaded.items == [FACT]


def test_questions_are_learned_at_the_names_in_them() -> None:
    asked = QuestionAnswer("Where does Eiffel Tower stand?", "Rome")
    memory = written([FACT, asked], chat=True)
    assert memory.config.things == ["Eiffel Tower"]
    assert memory.route(["Where does the church stand?"]) == [None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_layer": 3}, "last block"),
        ({"layers": [1, 2]}, "must be above `key_layer`"),
        ({"units": 0}, "`units`"),
        ({"values": "both"}, "`values`"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject_memory(tiny_model(), config(**settings))


def test_what_it_does_not_take_is_an_error() -> None:
    memory = inject_memory(tiny_model(), config(), tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="`training_args` is an option"):
        memory.write(FACT, training_args={"bf16": True})  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="call `inject_memory`"):
        get_peft_model(tiny_model(), config())  # type: ignore[arg-type]
