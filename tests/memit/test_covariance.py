"""C₀: against a plain float64 mean, resumed, shared among processes, saved, sampled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_adapters import Covariance, CovarianceFitter
from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.memit.corpus import portions, read_texts, sample_tokens
from memory_adapters.memit.projection import mlp_projection
from tests.support.contract import on_architectures
from tests.support.models import byte_tokenizer, tiny_model

TEXTS = [f"Text number {i} says that {i * i} is {i} times {i}. " * (1 + i % 4) for i in range(40)]


def plain(model: Any, layer: int, rows: list[list[int]]) -> Tensor:
    """Mean of k kᵀ, one text at a time, whole forward passes, float64."""
    keys: list[Tensor] = []
    module = mlp_projection(find_decoder(model), layer).module
    handle = module.register_forward_pre_hook(
        lambda _m, args: keys.append(args[0].detach().reshape(-1, args[0].shape[-1]))
    )
    for row in rows:
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
    handle.remove()
    k = torch.cat(keys).double()
    return k.T @ k / len(k)


def rows_of(budget: int, length: int = 512) -> list[list[int]]:
    found = portions(TEXTS, byte_tokenizer(), column="text", skip=0, num_tokens=budget, row_length=length)
    return [row for portion in found for row in portion.rows]


@on_architectures("llama", "gpt2", "opt", "gptj", "bloom", "gemma2")
def test_the_covariance_is_the_mean_over_real_tokens(architecture: str) -> None:
    model = tiny_model(architecture)
    fitter = CovarianceFitter(model, byte_tokenizer(), [1, 3]).fit(TEXTS, 1500, progress=False)
    found = fitter.covariance()
    rows = rows_of(1500)
    assert found.num_tokens == sum(map(len, rows)) == 1500
    for layer in (1, 3):
        torch.testing.assert_close(found.matrices[layer].double(), plain(model, layer, rows), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.matrices[layer], found.matrices[layer].T)


def test_long_texts_become_rows_of_the_models_length() -> None:
    assert all(len(row) <= 100 for row in rows_of(3000, 100))
    assert [t for row in rows_of(3000, 100) for t in row] == [t for row in rows_of(3000) for t in row]


def test_texts_come_from_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(TEXTS[:3]), encoding="utf-8")
    stripped = [text.strip() for text in TEXTS[:3]]
    assert list(read_texts(file)) == list(read_texts(str(file))) == stripped
    assert list(read_texts("one text")) == ["one text"]
    assert list(read_texts([{"body": "a"}, {"body": " "}], "body")) == ["a"]
    datasets = pytest.importorskip("datasets")
    stored = datasets.Dataset.from_dict({"text": TEXTS})
    model = tiny_model()
    direct = CovarianceFitter(model, byte_tokenizer(), [1]).fit(TEXTS, 900, progress=False).covariance()
    for source in (stored, stored.to_iterable_dataset()):
        found = CovarianceFitter(model, byte_tokenizer(), [1]).fit(source, 900, progress=False).covariance()
        assert torch.equal(found.matrices[1], direct.matrices[1])
    with pytest.raises(ValueError, match="column='body'"):
        list(read_texts([{"text": "a"}], "body"))
    with pytest.raises(TypeError, match="`texts` is a int"):
        list(read_texts(3))
    with pytest.raises(ValueError, match="no tokens"):
        CovarianceFitter(model, byte_tokenizer(), [1]).fit([" "], 10, progress=False)


def test_a_fit_resumed_after_a_kill_gives_the_same_covariance(tmp_path: Path) -> None:
    model, file = tiny_model(), tmp_path / "state.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memory_adapters.memit.corpus.PORTION_TOKENS", 400)
        whole = CovarianceFitter(model, byte_tokenizer(), [1, 2]).fit(TEXTS, 3000, progress=False).covariance()

        class KilledError(Exception):
            pass

        killed = CovarianceFitter(model, byte_tokenizer(), [1, 2])
        calls = 0

        def update(rows: Any, original: Any = killed.update) -> None:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KilledError
            original(rows)

        killed.update = update  # type: ignore[method-assign]
        with pytest.raises(KilledError):
            killed.fit(TEXTS, 3000, checkpoint=file, progress=False)
        assert 0 < Covariance.load(file).num_tokens < 3000
        again = CovarianceFitter(model, byte_tokenizer(), [1, 2]).fit(TEXTS, 3000, checkpoint=file, progress=False)
    assert again.num_tokens == whole.num_tokens == 3000
    assert again.num_texts == whole.num_texts
    for layer, matrix in again.covariance().matrices.items():
        torch.testing.assert_close(matrix, whole.matrices[layer], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"layers \[1, 2\], the fitter \[1\]"):
        CovarianceFitter(model, byte_tokenizer(), [1]).fit(TEXTS, 3000, checkpoint=file, progress=False)
    with pytest.raises(ValueError, match="another base model"):
        CovarianceFitter(tiny_model(seed=2), byte_tokenizer(), [1, 2]).fit(TEXTS, 3000, checkpoint=file, progress=False)


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = CovarianceFitter(tiny_model(), byte_tokenizer(), [1]).fit(TEXTS, 500, source="rhymes", progress=False)
    found.covariance().save(tmp_path / "c.safetensors")
    loaded = Covariance.load(tmp_path / "c.safetensors")
    assert torch.equal(loaded.matrices[1], found.covariance().matrices[1])
    assert (loaded.num_tokens, loaded.source) == (500, "rhymes")
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    data = bytearray((tmp_path / "c.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "c.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="was changed after it was saved"):
        Covariance.load(tmp_path / "c.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        Covariance.load(tmp_path / "c.safetensors")


def test_sums_are_float32_whatever_the_default_dtype_is() -> None:
    model, default = tiny_model(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        fitted = CovarianceFitter(model, byte_tokenizer(), [1]).fit(TEXTS, 500, progress=False)
        sampled = CovarianceFitter(model, byte_tokenizer(), [1]).sample(128, progress=False)
    finally:
        torch.set_default_dtype(default)
    plain_fit = CovarianceFitter(model, byte_tokenizer(), [1]).fit(TEXTS, 500, progress=False)
    plain_sample = CovarianceFitter(model, byte_tokenizer(), [1]).sample(128, progress=False)
    for found, expected in ((fitted, plain_fit), (sampled, plain_sample)):
        assert found.sums[0].dtype == torch.float32
        torch.testing.assert_close(found.sums[0], expected.sums[0])


@on_architectures("llama", "gptj", "bloom")
def test_sampled_keys_are_those_of_the_sampled_text(architecture: str) -> None:
    model, tokenizer = tiny_model(architecture), byte_tokenizer()
    state = torch.get_rng_state()
    found = CovarianceFitter(model, tokenizer, [2]).sample(640, seed=3, progress=False).covariance()
    assert torch.equal(torch.get_rng_state(), state)
    ids = sample_tokens(model, tokenizer, rows=10, length=64, seed=3)
    rows = [[tokenizer.bos_token_id, *row[:-1]] for row in ids.tolist()]
    assert found.num_tokens == 640
    torch.testing.assert_close(found.matrices[2].double(), plain(model, 2, rows), rtol=1e-3, atol=1e-4)


def test_sampling_follows_the_models_distribution() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    ids = sample_tokens(model, tokenizer, rows=4000, length=1, seed=0)[:, 0]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1]])).logits[0, -1].softmax(-1)
    observed = torch.bincount(ids, minlength=260) / len(ids)
    assert (observed - expected).abs().max() < 0.02
    assert torch.corrcoef(torch.stack([observed, expected]))[0, 1] > 0.5


SCRIPT = """
import sys, torch
from accelerate import PartialState
state = PartialState(cpu=True)
assert state.num_processes == 2 and state.backend == "gloo"
torch.set_num_threads(1)
from tests.memit.test_write import FACTS, memory_on
from tests.memit.test_covariance import TEXTS
from tests.support.models import tiny_model
memory = memory_on(tiny_model())
covariance = memory.fit_covariance(TEXTS, 3000, progress=False)
sampled = memory.fit_covariance(None, 400, progress=False)
memory.write(FACTS, covariance=covariance, progress=False)
if state.is_main_process:
    torch.save((covariance.matrices, sampled.matrices, memory.ledger.shares, memory.ledger.keys), sys.argv[1])
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_covariance_and_edit_of_one(tmp_path: Path) -> None:
    from tests.memit.test_write import FACTS, memory_on

    script = tmp_path / "share.py"
    script.write_text(SCRIPT)
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"  # gloo: no GPU
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "--main_process_port", "0"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [*command, str(script), str(tmp_path / "found.pt")], check=True, cwd=root, timeout=300, env=environment
    )
    covariance, sampled, shares, keys = torch.load(tmp_path / "found.pt")
    memory = memory_on(tiny_model())
    one_process = memory.fit_covariance(TEXTS, 3000, progress=False)
    also = memory.fit_covariance(None, 400, progress=False)
    memory.write(FACTS, covariance=one_process, progress=False)
    for layer in (1, 2):
        torch.testing.assert_close(covariance[layer], one_process.matrices[layer], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sampled[layer], also.matrices[layer], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(keys[layer], memory.ledger.keys[layer], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(shares[layer], memory.ledger.shares[layer], rtol=1e-4, atol=1e-4)
