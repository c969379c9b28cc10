"""The covariance of sampled text is sampled once for a model: it is kept in the cache, and with the memory if asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import Covariance, CovarianceFitter, MemitMemory, inject_memory, load_memory
from memory_adapters.memit import covariance_cache
from tests.memit.test_contract import FACT
from tests.support.composing import SUITES, put
from tests.support.models import byte_tokenizer, tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own; the folder with the covariances."""
    monkeypatch.setenv("MEMORY_ADAPTERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "covariances"


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each time that a model samples."""
    found: list[int] = []
    sample = CovarianceFitter.sample

    def counted(self: CovarianceFitter, num_tokens: int, **settings: Any) -> CovarianceFitter:
        found.append(num_tokens)
        return sample(self, num_tokens, **settings)

    monkeypatch.setattr(CovarianceFitter, "sample", counted)
    return found


def memory_on(model: Any, **settings: Any) -> MemitMemory:
    memory = inject_memory(model, SUITES["memit"].make_config(**settings), tokenizer=byte_tokenizer())
    assert isinstance(memory, MemitMemory)
    return memory


def fitted(model: Any, **settings: Any) -> Covariance:
    memory = memory_on(model, **settings)
    found = memory.fit_covariance(progress=False)
    memory.remove()
    return found


def same(one: Covariance, other: Covariance) -> bool:
    alike = all(torch.equal(one.matrices[layer], matrix) for layer, matrix in other.matrices.items())
    return alike and (one.num_tokens, one.source) == (other.num_tokens, other.source)


def test_a_later_memory_takes_it_from_the_cache(cache: Path, sampled: list[int]) -> None:
    memory = memory_on(tiny_model())
    memory.write(FACT, progress=False)
    assert len(sampled) == len(list(cache.iterdir())) == 1
    other = memory_on(tiny_model())
    other.write(FACT, progress=False)
    assert len(sampled) == 1
    assert memory.covariance is not None
    assert other.covariance is not None
    assert same(other.covariance, memory.covariance)
    for name, tensor in memory.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def one_weight(model: Any) -> Any:
    with torch.no_grad():
        model.get_input_embeddings().weight[200, 7] += 1e-3
    return model


OTHERS: dict[str, Callable[[], Covariance]] = {
    "other weights": lambda: fitted(tiny_model(seed=1)),
    "one weight": lambda: fitted(one_weight(tiny_model())),
    "another precision": lambda: fitted(tiny_model(dtype=torch.bfloat16)),
    "another architecture": lambda: fitted(tiny_model("qwen2")),
    "other blocks": lambda: fitted(tiny_model(), layers=[0]),
    "more tokens": lambda: fitted(tiny_model(), covariance_tokens=320),
    "another seed": lambda: fitted(tiny_model(), seed=5),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_sampled_otherwise_is_sampled_anew(other: str, sampled: list[int]) -> None:
    fitted(tiny_model())
    OTHERS[other]()
    assert len(sampled) == 2
    OTHERS[other]()
    assert len(sampled) == 2


def test_adapters_count_only_if_they_take_part(cache: Path, sampled: list[int]) -> None:
    alone = fitted(tiny_model())
    model = tiny_model()
    residual = put(model, "residual", "residual", 1)
    assert residual is not None
    beside = fitted(model)
    assert len(sampled) == 2
    assert not same(beside, alone)
    assert len(list(cache.iterdir())) == 1, "what other adapters take part in is not kept"
    residual.active = False
    assert same(fitted(model), alone)
    put(model, "slots", "slots", 1)
    assert same(fitted(model), alone)
    assert len(sampled) == 2


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-1] + b"\1"]
)
def test_a_damaged_file_is_sampled_and_kept_again(damage: Any, cache: Path, sampled: list[int]) -> None:
    first = fitted(tiny_model())
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert same(fitted(tiny_model()), first)
    assert len(sampled) == 2
    assert same(fitted(tiny_model()), first)
    assert len(sampled) == 2


def test_without_a_place_to_keep_it_the_write_goes_on(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder would be")
    memory_on(tiny_model()).write(FACT, progress=False)
    assert cache.read_text() == "a file where the folder would be"


def test_those_used_longest_ago_are_deleted(cache: Path, sampled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    fitted(tiny_model(), seed=1)
    (oldest,) = cache.iterdir()
    monkeypatch.setattr(covariance_cache, "MOST_BYTES", 2 * oldest.stat().st_size)
    fitted(tiny_model(), seed=2)
    covariance_cache.os.utime(oldest, (1, 1))
    fitted(tiny_model(), seed=1)  # used now
    for file in cache.iterdir():
        if file != oldest:
            covariance_cache.os.utime(file, (1, 1))
    fitted(tiny_model(), seed=3)
    assert len(list(cache.iterdir())) == 2
    assert oldest.exists()
    monkeypatch.setattr(covariance_cache, "MOST_BYTES", 10)
    fitted(tiny_model(), seed=4)
    assert len(list(cache.iterdir())) == 2, "one that is larger than all may be is not kept"


def test_saved_with_the_memory_if_asked(tmp_path: Path, cache: Path, sampled: list[int]) -> None:
    memory = memory_on(tiny_model())
    with pytest.raises(ValueError, match="`covariance=True`, but nothing was written"):
        memory.save_pretrained(tmp_path / "edit", covariance=True)
    assert not (tmp_path / "edit").exists()
    memory.write(FACT, progress=False)
    memory.save_pretrained(tmp_path / "edit", covariance=True)
    for file in cache.iterdir():
        file.unlink()
    loaded = load_memory(tiny_model(), tmp_path / "edit", tokenizer=byte_tokenizer())
    assert isinstance(loaded, MemitMemory)
    assert loaded.covariance is not None
    assert memory.covariance is not None
    assert same(loaded.covariance, memory.covariance)
    loaded.write(FACT, progress=False)
    assert len(sampled) == 1
    loaded.save_pretrained(tmp_path / "edit")
    assert same(Covariance.load(tmp_path / "edit"), memory.covariance)
    fitted(tiny_model(seed=1)).save(tmp_path / "edit" / Covariance.file)
    other = load_memory(tiny_model(), tmp_path / "edit")
    assert isinstance(other, MemitMemory)
    assert other.covariance is None, "it is of another model"
