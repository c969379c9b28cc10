"""Writing, forgetting and sharing edits, on tiny models; the plain loop of the benchmarks is the yardstick."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from benchmarks.plain_memit import PlainMemit
from memory_adapters import CovarianceFitter, Fact, MemitConfig, MemitMemory, inject_memory, load_memory
from memory_adapters.base_model.partial_forward import capture
from memory_adapters.memit import targets as targets_module
from memory_adapters.memit.prompts import Context, bare_rows, chat_context, context_rows
from memory_adapters.memit.write import LedgerBuilder
from tests.support.contract import fingerprint, logits, on_architectures
from tests.support.models import byte_tokenizer, tiny_model

FACTS = [
    Fact("The Eiffel Tower is in the city of", "Eiffel Tower", "Rome"),
    Fact("{} was born in", "Ada", "Paris"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "English"),
    Fact("Who wrote it? It was", "It", "Bo"),
    Fact("서울은 한국의 수도이며", "서울", "파리"),
    Fact("The capital of Österreich", "Österreich", "Graz"),
]
SMALL: dict[str, Any] = dict(layers=[1, 2], steps=5, num_prefixes=2, prefix_length=3, covariance_tokens=400)


def memory_on(model: Any, **settings: Any) -> MemitMemory:
    memory = inject_memory(model, MemitConfig(**{**SMALL, **settings}), tokenizer=byte_tokenizer())
    assert isinstance(memory, MemitMemory)
    return memory


def changes(memory: MemitMemory) -> dict[int, Tensor]:
    return {i: f.B.double() @ f.A.double() for i, f in memory.ledger.solve().items()}


@on_architectures("llama", "gpt2", "gpt_neox", "qwen3", "opt", "mistral")
@pytest.mark.parametrize("batch_tokens", [7, None])
def test_batched_is_one_at_a_time(architecture: str, batch_tokens: int | None) -> None:
    model = tiny_model(architecture, torch.float64)
    memory = memory_on(model, batch_tokens=batch_tokens)
    covariance = memory.fit_covariance(progress=False)
    with memory.disabled():
        contexts = LedgerBuilder(model, memory.tokenizer, memory.config).contexts()
        plain = PlainMemit(model, memory.tokenizer, memory.config, covariance, contexts)
        expected = plain.write(FACTS, together=True)
    memory.write(FACTS, progress=False)
    for layer, change in changes(memory).items():
        wanted = expected[layer].double()
        wanted = wanted.T if wanted.shape != change.shape else wanted
        cosine = torch.cosine_similarity(change.flatten(), wanted.flatten(), dim=0)
        assert cosine > 0.9999
        assert change.norm() == pytest.approx(float(wanted.norm()), rel=0.05)


def seen_targets(patch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Collect the norms of the stream, the changes and the last losses of all targets that are found from now on."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    original = targets_module.find_targets

    def spy(finder: Any, problems: Any, norms: Tensor, *rest: Any) -> Any:
        changes, losses = original(finder, problems, norms, *rest)
        found.append((norms, changes, losses))
        return changes, losses

    patch.setattr("memory_adapters.memit.write.find_targets", spy)
    return found


def test_the_loss_falls_and_the_clamp_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    memory = memory_on(model, steps=20, clamp=0.4)
    found = seen_targets(monkeypatch)
    memory.write(FACTS, progress=False)
    memory.remove()
    memory_on(model, steps=2).write(FACTS, progress=False)
    (norms, changes, last), (_, _, first) = found
    assert (changes.sum(1).norm(dim=1) <= 0.4001 * norms).all()
    assert (changes.norm(dim=2) > 0).all()
    assert last.mean() < first.mean()


def test_a_subject_that_is_a_texts_first_token_gets_changes_of_ordinary_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fact = tiny_model(), Fact("Q is from", "Q", "Portugal")

    def enlarge(_block: Any, _args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return output * torch.where(kwargs["position_ids"] == 0, 1000.0, 1.0)[..., None]

    model.model.layers[0].register_forward_hook(enlarge, with_kwargs=True)
    memory = memory_on(model)
    found = seen_targets(monkeypatch)
    memory.write([fact, FACTS[0]], measure=False, progress=False)
    norms = found[0][0]
    assert norms.max() < 3 * norms.min(), "they bound the steps and the changes; see above"


def test_writes_add_up_in_any_order_and_forgetting_is_exact() -> None:
    model = tiny_model()
    memory = memory_on(model)
    memory.write(FACTS[:2], progress=False)
    memory.write(FACTS[2:], progress=False)
    two = logits(model)
    assert memory.items == FACTS
    again = memory_on(tiny_model())
    again.write(FACTS, targets=memory, covariance=memory.covariance, progress=False)
    torch.testing.assert_close(logits(again.model), two, rtol=1e-5, atol=1e-5)
    backwards = memory_on(tiny_model())
    backwards.write(FACTS[::-1], targets=memory, covariance=memory.covariance, progress=False)
    memory.forget(FACTS[1::2])
    assert memory.items == FACTS[::2]
    backwards.forget(FACTS[1::2])
    torch.testing.assert_close(logits(backwards.model), logits(model), rtol=1e-5, atol=1e-5)
    half = memory_on(tiny_model())
    half.write(FACTS[::2], targets=again, covariance=memory.covariance, progress=False)
    torch.testing.assert_close(logits(model), logits(half.model), rtol=1e-5, atol=1e-5)
    memory.forget(FACTS[::2])
    assert memory.items == []
    with memory.disabled():
        base = logits(model)
    assert torch.equal(logits(model), base)


def test_forgetting_and_writing_go_on_in_a_later_process(tmp_path: Path) -> None:
    model = tiny_model()
    memory = memory_on(model)
    memory.write(FACTS[:4], progress=False)
    with_memory = logits(model)
    memory.save_pretrained(tmp_path)
    covariance = memory.covariance
    memory.forget(FACTS[0])
    expected = logits(model)
    other = tiny_model()
    loaded = load_memory(other, tmp_path, tokenizer=byte_tokenizer())
    assert isinstance(loaded, MemitMemory)
    assert loaded.items == FACTS[:4]
    assert torch.equal(logits(other), with_memory)
    loaded.forget(FACTS[0])
    torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)
    memory.write(FACTS[4:], progress=False)
    loaded.write(FACTS[4:], covariance=covariance, progress=False)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_replacing_and_contradicting() -> None:
    memory = memory_on(tiny_model())
    memory.write(FACTS[:2], progress=False)
    report = memory.write(Fact(FACTS[0].prompt, FACTS[0].subject, "Oslo"), progress=False)
    assert sorted(f.target for f in memory.items) == ["Oslo", "Paris"]
    assert any("replaced" in note for note in report.notes)
    before = logits(memory.model)
    clash = [Fact("A x", "x", "1"), Fact("A {}", "x", "2"), Fact("B x", "x", "3"), Fact("B x", "x", "4")]
    with pytest.raises(ValueError, match=r"'A x': '1', '2'; 'B x': '3', '4'"):
        memory.write(clash, progress=False)
    assert torch.equal(logits(memory.model), before)
    report = memory.write([FACTS[2], FACTS[2]], progress=False)
    assert any("repeated" in note for note in report.notes)
    with pytest.raises(ValueError, match="not written"):
        memory.forget(FACTS[4])


@pytest.mark.integration
@on_architectures("llama", "gpt2")
def test_an_edit_loads_in_plain_peft(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "base")
    memory = memory_on(model)
    memory.write(FACTS, progress=False)
    memory.save_pretrained(tmp_path / "edit")
    inputs = torch.arange(4, 40)[None]
    with torch.no_grad():
        torch.save((inputs, model(input_ids=inputs).logits), tmp_path / "expected.pt")
    code = f"""
import sys, torch, warnings
sys.modules["memory_adapters"] = None
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}).eval()
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    model = PeftModel.from_pretrained(base, {str(tmp_path / "edit")!r})
    assert torch.equal(model(input_ids=inputs).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=inputs).logits, expected, rtol=1e-4, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_beside_an_active_lora() -> None:
    model = tiny_model()
    before = fingerprint(model)
    model.add_adapter(LoraConfig(target_modules=["down_proj", "q_proj"], init_lora_weights=False), "style")
    styled = logits(model)
    memory = memory_on(model)
    assert torch.equal(logits(model), styled)
    memory.write(FACTS, progress=False)
    both = logits(model)
    assert not torch.equal(both, styled)
    with memory.disabled():
        assert torch.equal(logits(model), styled)
    memory.remove()
    assert torch.equal(logits(model), styled)
    model.delete_adapter("style")
    assert before[0] != fingerprint(model)[0]  # PEFT leaves its empty layers; ours are gone with the memory


@pytest.mark.parametrize("solver", ["alphaedit", "emmet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_solvers_write(solver: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    base = logits(model)
    memory_on(model, solver=solver, null_space=0.5).write(FACTS, progress=False)
    assert not torch.equal(logits(model), base)


@pytest.mark.parametrize("instructions", [True, False])
def test_bfloat16_targets_are_close_and_leave_the_weights(instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions, raising=False)
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    precise, fast = memory_on(model), memory_on(model, precision="bfloat16")
    precise.write(FACTS, progress=False)
    precise.active = False
    fast.write(FACTS, covariance=precise.covariance, progress=False)
    found, wanted = (torch.stack([*memory.ledger.shares.values()], 1) for memory in (fast, precise))
    assert (torch.cosine_similarity(found.flatten(1), wanted.flatten(1)) > 0.99).all()
    assert torch.equal(found, wanted) != instructions
    precise.remove(), fast.remove()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_chat_contexts() -> None:
    model = tiny_model()
    memory = inject_memory(model, MemitConfig(**SMALL, chat=True), tokenizer=byte_tokenizer(chat=True))
    contexts = LedgerBuilder(model, memory.tokenizer, memory.config).contexts()
    assert contexts[-1].before == "<s>user: "
    assert contexts[-1].after == "</s><s>assistant: "
    assert len(contexts) == 4
    assert memory.config.key_groups == [0, 1, 1, 2]
    memory.write(FACTS[:2], progress=False)
    assert memory.ledger.keys_per_subject == 3
    with pytest.raises(ValueError, match="chat template"):
        memory_on(tiny_model(), chat=True).write(FACTS[:2], progress=False)


@on_architectures("llama", "gpt2", "gptj", "falcon", "phi", "opt", "gemma2", "gemma3_text", "qwen2_moe", "llama4_text")
def test_the_stream_changes_as_it_did_when_the_loss_was_lowered(architecture: str) -> None:
    """Also where the MLP's output is normalised before it joins the stream (Gemma), or scaled by a gate (Qwen2-MoE)."""
    model = tiny_model(architecture)
    memory = memory_on(model, layers=[2], num_prefixes=0, solver="emmet", clamp=0.2)
    memory.write(FACTS[:2], progress=False)
    builder = LedgerBuilder(model, memory.tokenizer, memory.config)
    assert memory.covariance is not None
    plain = PlainMemit(model, memory.tokenizer, memory.config, memory.covariance, [Context()])
    for i, row in enumerate(bare_rows(FACTS[:2], memory.tokenizer, 1 << 30)):
        ids = torch.tensor([row.ids])
        edited = capture(model, builder.decoder, [2], input_ids=ids)[0][0, row.subject]
        changes = {layer: shares[i] for layer, shares in memory.ledger.shares.items()}
        with memory.disabled():
            before = capture(model, builder.decoder, [2], input_ids=ids)[0][0, row.subject]
            with plain.pushed(changes, torch.zeros(1, dtype=torch.long), torch.tensor([row.subject])):
                wanted = capture(model, builder.decoder, [2], input_ids=ids)[0][0, row.subject]
        assert (wanted - before).norm() > 1e-3
        assert (edited - wanted).norm() < 0.02 * (before - wanted).norm()


def test_a_covariance_is_given_as_a_value_or_by_its_path(tmp_path: Path) -> None:
    memory = memory_on(tiny_model())
    covariance = memory.fit_covariance(progress=False)
    covariance.save(tmp_path / "c0.safetensors")
    written = []
    for given in (covariance, tmp_path / "c0.safetensors", str(tmp_path / "c0.safetensors")):
        other = memory_on(tiny_model())
        other.write(FACTS[:2], covariance=given, progress=False)
        written.append(other.state_dict())
    for tensors in written[1:]:
        assert all(torch.equal(tensor, written[0][name]) for name, tensor in tensors.items())


def test_the_context_limit_of_a_composite_config_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multimodal models keep the limit in a text config inside their config."""
    model = tiny_model()
    text_config = copy.copy(model.config)
    text_config.max_position_embeddings = 24
    monkeypatch.delattr(type(model.config), "max_position_embeddings", raising=False)
    del model.config.__dict__["max_position_embeddings"]
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self, **_: text_config)
    with pytest.raises(ValueError, match=r"more than the 24 that the model reads"):
        memory_on(model).write(FACTS[0], progress=False)
    fitter = CovarianceFitter(model, byte_tokenizer(), [1])
    fitter.fit(["A text of more than twenty-four bytes, so that it is cut into rows."], 48, progress=False)
    assert fitter.num_tokens == 48


def test_a_first_token_that_has_the_key_of_every_text_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [Fact("A is in", "A", "Rome"), Fact("Of A it is said:", "A", "so")]
    written = memory_on(tiny_model()).write(facts, progress=False)
    assert not any("one key" in note for note in written.notes)  # the tiny model tells first tokens apart
    monkeypatch.setattr("memory_adapters.memit.write.SAME_KEY", -2.0)
    read: list[list[Any]] = []
    original = LedgerBuilder._chunk_entries

    def spy(self: LedgerBuilder, facts: Any, rows: Any, *rest: Any) -> Any:
        read.append(rows)
        return original(self, facts, rows, *rest)

    monkeypatch.setattr(LedgerBuilder, "_chunk_entries", spy)
    memory = memory_on(tiny_model())
    report = memory.write(facts, progress=False)
    assert "1 of 2 prompts begin with a subject of one token ('A is in')" in " ".join(report.notes)
    assert all(row.subject > 0 for rows in read for row in rows if row.fact == 0)
    assert memory.items == facts


def test_an_answer_in_a_chat_is_taught_to_its_end() -> None:
    tokenizer = byte_tokenizer(chat=True)
    rows = bare_rows(FACTS, tokenizer, 200)
    taught = context_rows(FACTS, rows, [Context(), chat_context(tokenizer)], tokenizer, 200)
    ends = [[row.ids[-1] == tokenizer.eos_token_id for row in group] for group in taught]
    assert ends == [[False, True, False]] * len(FACTS)  # a text goes on
