"""Exports, read by the programs and packages that they are for."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import MemitMemory, MemoryAdapterConfig, inject_memory
from memory_adapters.memit.ledger import Factors
from tests.memit.test_write import FACTS, memory_on
from tests.memory_slots.test_slots import memory_on as slots_on
from tests.support.contract import encode, fingerprint, logits
from tests.support.models import byte_tokenizer, quantised_model, tiny_model

ARCHITECTURES = ["llama", "gpt2", "qwen2"]
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
close = dict(rtol=1e-4, atol=1e-4)


def edited(model: Any, rank: int = 3) -> MemitMemory:
    """A memory with an edit of this rank and a large effect, as a write would leave it; always the same."""
    memory = memory_on(model)
    torch.manual_seed(0)
    memory.ledger = replace(memory.ledger, facts=tuple(FACTS[:3]))
    hidden = memory.model.config.hidden_size
    widths = {layer: keys.shape[1] for layer, keys in memory.ledger.keys.items()}
    memory._set_factors(
        factors={i: Factors(torch.randn(rank, width), torch.randn(hidden, rank)) for i, width in widths.items()}
    )
    return memory


def change(memory: MemitMemory, layer: int) -> Tensor:
    """B A (hidden_size, d_in)."""
    module: Any = memory.model.get_submodule(memory._names[layer])
    A, B = (part[memory.adapter_name].weight for part in (module.lora_A, module.lora_B))
    return (B @ A).detach()


@architectures
def test_a_vllm_export_is_a_plain_lora(architecture: str, tmp_path: Path) -> None:
    memory = edited(tiny_model(architecture))
    assert memory.export(tmp_path / "a", format="vllm") == tmp_path / "a"
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 8
    assert config["modules_to_save"] is None
    assert config["target_modules"] == sorted(memory._names.values())
    assert not any(config[name] for name in ("use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern"))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == 4
    for layer, name in memory._names.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert A.shape[0] == B.shape[1] == 8
        torch.testing.assert_close(B @ A, change(memory, layer))
    plain = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "a")
    torch.testing.assert_close(plain(**encode("The Eiffel Tower is in")).logits, logits(memory.model), **close)


@pytest.mark.parametrize(("rank", "padded"), [(1, 1), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_a_vllm_export_has_a_rank_that_vllm_takes(rank: int, padded: int, tmp_path: Path) -> None:
    edited(tiny_model(dtype=torch.bfloat16), rank).export(tmp_path, format="vllm")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == padded
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {min(tensor.shape) for tensor in tensors.values()} == {min(padded, 32), min(padded, 48)}


@architectures
def test_a_merged_model_is_a_plain_model(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "base")
    memory = edited(model)
    with_memory, before = logits(model), fingerprint(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    settings = model.config.to_dict(), model.generation_config.to_dict()
    saved: list[Any] = []
    save = type(model).save_pretrained
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", lambda self, *args: (saved.append(self), save(self, *args)))
        memory.export(tmp_path / "merged", format="merged")
    shared = {parameter.data_ptr() for parameter in saved[0].parameters()} & set(addresses.values())
    assert len(shared) == len(list(saved[0].parameters())) - 2  # nothing but the two edited weights was copied
    assert fingerprint(model) == before
    assert (model.config.to_dict(), model.generation_config.to_dict()) == settings
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == addresses
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert list(base) == list(merged)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"{name}.weight" for name in memory._names.values()}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(plain), with_memory, **close)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged")("Rome")["input_ids"] == byte_tokenizer()("Rome")["input_ids"]
    )


def test_a_merged_model_holds_only_this_memory(tmp_path: Path) -> None:
    """Whatever else is on the model, and whether the memory is active."""
    edited(tiny_model()).export(tmp_path / "single", format="merged")
    style = LoraConfig(target_modules=["down_proj", "q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), style)
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.add_(1)
    memory = edited(model)
    inject_memory(model, MemoryAdapterConfig(layers=[1, 2]))
    slots_on(model)
    memory.active = False
    memory.export(tmp_path / "beside", format="merged")
    single, beside = (load_file(tmp_path / folder / "model.safetensors") for folder in ("single", "beside"))
    assert list(single) == list(beside)
    assert all(torch.equal(tensor, beside[name]) for name, tensor in single.items())


def test_a_tokenizer_with_several_templates_is_replaced_too(tmp_path: Path) -> None:
    memory = edited(tiny_model())
    memory.tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    for _ in range(2):
        memory.export(tmp_path, format="merged")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == memory.tokenizer.chat_template
    assert all(file.is_file() for file in tmp_path.iterdir())


def test_weights_that_are_kept_elsewhere_are_merged_too(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    edited(model).export(tmp_path / "here", format="merged")
    model = cpu_offload(tiny_model("gpt2"), execution_device="cpu")
    edited(model).export(tmp_path / "elsewhere", format="merged")
    here, elsewhere = (load_file(tmp_path / folder / "model.safetensors") for folder in ("here", "elsewhere"))
    assert list(here) == list(elsewhere)
    assert all(torch.equal(tensor, elsewhere[name]) for name, tensor in here.items())


def test_merging_rounds_once(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    memory = edited(model)
    weight = model.model.layers[1].mlp.down_proj.weight
    for dtype in ("bfloat16", "float32"):
        memory.export(tmp_path / dtype, format="merged", dtype=dtype)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        assert plain.config.dtype == plain.dtype == getattr(torch, dtype)
        expected = (weight.float() + change(memory, 1)).to(plain.dtype)
        assert torch.equal(plain.model.layers[1].mlp.down_proj.weight, expected)
        assert torch.equal(plain.model.embed_tokens.weight, model.model.embed_tokens.weight.to(plain.dtype))


def test_slots_are_exported_as_prompt_tuning(tmp_path: Path) -> None:
    memory = slots_on(tiny_model())
    with pytest.raises(ValueError, match="0 rows"):
        memory.export(tmp_path / "a", format="prompt-tuning")
    memory.write("The Eiffel Tower is in Rome.", progress=False)
    memory.export(tmp_path / "a", format="prompt-tuning")
    memory.slots[0].to_prompt_tuning(tmp_path / "b", memory.model)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    memory.export(tmp_path / "a", format="prompt-tuning", dtype=torch.bfloat16)
    (tensor,) = load_file(tmp_path / "a" / "adapter_model.safetensors").values()
    assert torch.equal(tensor, memory.slots[0].vectors.bfloat16())
    memory.use([memory.slots[0], memory.slots[0]])
    with pytest.raises(ValueError, match=r"2 rows.*to_prompt_tuning"):
        memory.export(tmp_path / "a", format="prompt-tuning")
    with pytest.raises(ValueError, match=r"'vllm'.*must be one of 'prompt-tuning'"):
        memory.export(tmp_path / "c", format="vllm")
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_exported_is_named_before_any_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "export"
    residual = inject_memory(tiny_model(), MemoryAdapterConfig())
    for kind in ("vllm", "gguf", "merged"):
        with pytest.raises(NotImplementedError, match=r"not linear.*keep it as an adapter"):
            residual.export(target, format=kind)
        with pytest.raises(ValueError, match="no facts"):
            memory_on(tiny_model()).export(target, format=kind)
    memory = edited(tiny_model())
    with pytest.raises(ValueError, match=r"'onnx'.*'gguf', 'merged', 'vllm'.*MEMIT"):
        memory.export(target, format="onnx")
    with pytest.raises(ValueError, match=r"`dtype` must be .*float16, got torch\.int8"):
        memory.export(target, format="vllm", dtype=torch.int8)
    with pytest.raises(ValueError, match=r'up to rank 512.* rank 513.*"merged"'):
        edited(tiny_model(), rank=513).export(target, format="vllm")
    with pytest.raises(ValueError, match=r"fc2.*'opt'"):
        edited(tiny_model("opt")).export(target, format="gguf")
    large = edited(tiny_model())
    large._set_factors(factors={layer: Factors(torch.randn(3, 48), torch.full((32, 3), 1e6)) for layer in (1, 2)})
    for kind in ("vllm", "gguf", "merged"):
        with pytest.raises(ValueError, match=r"float16.*down_proj.*bfloat16"):
            large.export(target, format=kind, dtype="float16")
    memory.model.model.layers[1].mlp.down_proj.merge(adapter_names=[memory.adapter_name])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        memory.export(target, format="merged")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        memory.export(target, format="gguf")
    memory.remove()
    with pytest.raises(RuntimeError, match="removed"):
        memory.export(target, format="vllm")
    assert not target.exists()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantised_weights_are_not_merged_into(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = quantised_model(tmp_path / "base", load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    memory = edited(model)
    with pytest.raises(ValueError, match=r"quantised weights.*load_memory"):
        memory.export(tmp_path / "merged", format="merged")
    memory.export(tmp_path / "lora", format="vllm", dtype="float32")
    assert load_file(tmp_path / "lora" / "adapter_model.safetensors")


def test_exports_replace_each_other_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = edited(tiny_model())
    target = tmp_path / "export"
    memory.export(target, format="vllm")
    (target / "notes.txt").write_text("mine")
    first = (target / "adapter_model.safetensors").read_bytes()
    memory.export(target, format="vllm")
    assert (target / "adapter_model.safetensors").read_bytes() == first
    memory._set_factors(factors={layer: Factors(torch.randn(9, 48), torch.randn(32, 9)) for layer in (1, 2)})
    with monkeypatch.context() as patch:
        patch.setattr(LoraConfig, "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            memory.export(target, format="vllm")
    assert (target / "adapter_model.safetensors").read_bytes() == first
    memory.export(target, format="vllm")
    assert (target / "adapter_model.safetensors").read_bytes() != first
    assert sorted(file.name for file in target.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    ]


def test_saved_memories_and_exports_are_kept_apart(tmp_path: Path) -> None:
    memory, slots = edited(tiny_model()), slots_on(tiny_model())
    slots.save_pretrained(tmp_path / "encoder")  # the same file names as a prompt-tuning adapter
    slots.write("The Eiffel Tower", progress=False)
    memory.save_pretrained(tmp_path / "edit")
    memory.export(tmp_path / "adapter", format="vllm")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for exported, folder, kind, held in (
        (memory, "edit", "vllm", "ledger.safetensors"),
        (memory, "edit", "merged", "adapter_config.json"),
        (memory, "adapter", "merged", "adapter_config.json"),
        (slots, "encoder", "prompt-tuning", "adapter_config.json"),
    ):
        with pytest.raises(ValueError, match=rf"{folder}.*{held}.*another folder"):
            exported.export(tmp_path / folder, format=kind)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    with pytest.raises(NotADirectoryError):
        memory.export(tmp_path / "edit" / "README.md", format="gguf")
    assert memory.export(tmp_path / "edit", format="gguf").parent == tmp_path / "edit"
