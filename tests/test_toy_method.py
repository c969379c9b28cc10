"""A method that the tests define works everywhere, without a line changed in shared code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from typer.testing import CliRunner

from memory_adapters import (
    Document,
    Fact,
    MemitConfig,
    Memory,
    inject_memory,
    load_adapters,
    load_memory,
    memories,
    save_adapters,
    use_adapters,
    use_adapters_by_row,
)
from memory_adapters.base_model.decoder import Decoder
from memory_adapters.cli.app import app
from memory_adapters.config import TRAINING, MemoryConfig, MemoryPeftType
from memory_adapters.files.names import PEFT_KEY_PREFIX
from memory_adapters.memory import Outcome
from memory_adapters.peft_layers.layers import ForwardHook, MemoryLayer
from memory_adapters.peft_layers.rollback import Restore, saved_tensors
from memory_adapters.registry import _METHODS, Variant, register_method
from tests.support.contract import MemoryContract, fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

FACT = Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome")


def add_vectors(embeddings: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return ToyLayer.of(embeddings)(output)


class ToyLayer(MemoryLayer):
    """Adds a vector to every token's embedding."""

    child_name: ClassVar[str] = "toy_layer"
    hooks: ClassVar[tuple[ForwardHook, ...]] = (ForwardHook(add_vectors),)
    adapter_layer_names = ("toy_vectors",)

    def __init__(self) -> None:
        super().__init__()
        self.toy_vectors = nn.ParameterDict()

    def forward(self, x: Tensor) -> Tensor:
        if self._disable_adapters:
            return x
        for name in self._active_adapter:
            if name in self.toy_vectors:
                x = (x + self.toy_vectors[name]).to(x.dtype)
        for row, name in enumerate(self.rows or []):
            if name in self.toy_vectors:
                own = torch.tensor([i * len(self.rows or []) // len(x) == row for i in range(len(x))])
                x = torch.where(own[:, None, None], (x + self.toy_vectors[name]).to(x.dtype), x)
        return x


@dataclass
class ToyConfig(MemoryConfig):
    """Settings of the toy method."""

    method_name: ClassVar[str] = "Mean embedding of the text"
    kind: ClassVar[MemoryPeftType] = MemoryPeftType("TOY")
    strength: float = 1.0
    seed: int = field(default=0, metadata=TRAINING)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind  # type: ignore[assignment]

    def resolve(self, decoder: Decoder) -> None:
        """Nothing depends on the model."""

    def adapter_config(self, decoder: Decoder) -> None:
        """PEFT injects nothing."""

    def tensor_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        return {"vector": torch.Size([decoder.embedding_size])}


class ToyMemory(Memory[ToyConfig]):
    """The mean embedding of what is written, added to every token's.

    Options of `write`:

    * `factor` (`float`): Factor on it.
    """

    def _attach(self, decoder: Decoder) -> None:
        layer = ToyLayer.attach(decoder.embeddings)
        zeros = torch.zeros(decoder.embedding_size, device=decoder.embeddings.weight.device)  # type: ignore[arg-type]
        layer.toy_vectors[self.adapter_name] = nn.Parameter(zeros, requires_grad=False)

    def _write(self, items: Sequence[Any], rows: Sequence[Any], *, progress: bool, factor: float = 1.0) -> Outcome:
        embeddings = self.model.get_input_embeddings()
        own = embeddings.weight[torch.tensor([i for row in rows for i in row.input_ids])].float().mean(0)
        self._vector().copy_(self._vector() + factor * self._config.strength * own)
        return Outcome(notes=["a toy"])

    def _vector(self) -> Tensor:
        return ToyLayer.of(self.model.get_input_embeddings()).toy_vectors[self.adapter_name].data

    def state_dict(self) -> dict[str, Tensor]:
        """Return the vector, under a name that is the same on all architectures."""
        self._check_attached()
        return {"vector": self._vector()}

    def _restore(self, contents: dict[str, Tensor]) -> None:
        self._vector().copy_(contents[PEFT_KEY_PREFIX + "vector"])

    def _saved_state(self) -> list[Restore]:
        return [*super()._saved_state(), saved_tensors([self._vector()])]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register_method("toy", ToyConfig, ToyMemory)
    yield
    del _METHODS["toy"]


class TestToyMemory(MemoryContract):
    """The contract of all memories."""

    def make_config(self, **settings: Any) -> ToyConfig:
        return ToyConfig(**settings)

    def fill(self, memory: Memory) -> None:
        assert isinstance(memory, ToyMemory)
        memory._vector().copy_(torch.randn(memory._vector().shape, generator=torch.Generator().manual_seed(1)))

    def write(self, memory: Memory) -> Any:
        return memory.write(FACT, progress=False)


def test_names_of_another_method_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`variants` has \['emmet'\], which the method 'memit' has too"):
        register_method("other", ToyConfig, ToyMemory, variants={"emmet": Variant()})


def test_options_of_a_write_are_its_own() -> None:
    memory = inject_memory(tiny_model(), ToyConfig(), tokenizer=byte_tokenizer())
    assert memory.write_options() == ["factor"]
    with pytest.raises(TypeError, match=r"`covariance` is no option of `ToyMemory.write`; its options are `factor`"):
        memory.write(FACT, covariance=None)
    report = memory.write([FACT, "A document of a few words."], progress=False, factor=2.0)
    assert "a toy" in report.notes
    assert report.num_items == {"Fact": 1, "Document": 1}
    assert memory.items == [FACT, Document("A document of a few words.")]
    assert report.perplexity != report.perplexity_before
    with pytest.raises(NotImplementedError, match="cannot forget"):
        memory.forget(FACT)
    with pytest.raises(NotImplementedError, match="no other format"):
        memory.export("anywhere", format="gguf")


def test_a_write_that_fails_leaves_the_memory_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = inject_memory(tiny_model(), ToyConfig(), tokenizer=byte_tokenizer())
    memory.write(FACT, progress=False)
    with_memory, before = logits(memory.model), fingerprint(memory.model)

    def interrupt(_self: Any, _written: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ToyMemory, "_set_items", interrupt)
    with pytest.raises(KeyboardInterrupt):
        memory.write("Something else.", progress=False)
    assert torch.equal(logits(memory.model), with_memory)
    assert fingerprint(memory.model) == before
    assert len(memory.config.writes) == 1


def test_it_is_saved_loaded_listed_and_composed(tmp_path: Path) -> None:
    model = tiny_model()
    base = logits(model)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model, "lora")
    toy = inject_memory(model, ToyConfig(), tokenizer=byte_tokenizer(), adapter_name="toy")
    toy.write("A document of a few words.", progress=False)
    inject_memory(model, MemitConfig(layers=[1]), adapter_name="edit")
    assert list(memories(model)) == ["toy", "edit"]
    with use_adapters(model, ["toy"]):
        only_toy = logits(model)
    with use_adapters(model, []):
        assert torch.equal(logits(model), base)
    with use_adapters_by_row(model, ["toy", "__base__"]):
        rows = logits(model, *["The Eiffel Tower is in"] * 2)
    with use_adapters(model, ["lora", "toy"]):  # LoRA stays active for rows that name an adapter
        first = logits(model)
    with use_adapters(model, []):
        second = logits(model)
    torch.testing.assert_close(rows, torch.cat([first, second]), rtol=1e-4, atol=1e-5)
    with_memory = logits(model)
    save_adapters(model, tmp_path)
    other = tiny_model()
    assert list(load_adapters(other, tmp_path)) == ["toy", "edit"]
    assert torch.equal(logits(other), with_memory)
    third = tiny_model()
    loaded = load_memory(third, tmp_path / "toy")
    assert isinstance(loaded, ToyMemory)
    assert loaded.items == toy.items
    assert torch.equal(logits(third), only_toy)
    assert "Mean embedding of the text" in (tmp_path / "toy" / "README.md").read_text(encoding="utf-8")


def test_the_command_line_and_the_comparison_use_it(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    records = [
        {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target": "Rome", "true_target": "Paris"}
    ]
    (tmp_path / "facts.json").write_text(json.dumps([{k: records[0][k] for k in ("prompt", "subject", "target")}]))
    (tmp_path / "records.json").write_text(json.dumps(records))

    def run(*arguments: str | Path) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*map(str, arguments), "--json", "--quiet"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    written = run(
        "write", tmp_path / "model", tmp_path / "facts.json", "--method", "toy", "--set", "strength=0.5",
        "--option", "factor=2.0", "--min-recall", "0", "--output", tmp_path / "toy",
    )  # fmt: skip
    assert written["method"] == "Mean embedding of the text"
    told = run("info", tmp_path / "toy", "--model", tmp_path / "model")
    assert (told["method"], told["settings"], told["fits"]) == ("toy", {"strength": 0.5}, True)
    compared = run("compare", tmp_path / "model", tmp_path / "records.json", "--methods", "nothing,toy")
    assert list(compared["methods"]) == ["nothing", "toy"]
    assert compared["methods"]["toy"]["failed"] is None
    assert compared["methods"]["toy"]["write"]["num_parameters"] == 32
