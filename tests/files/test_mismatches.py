"""A memory and a model or tokenizer that do not belong together, though no shape says so: an error or a warning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tokenizers import normalizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig

from memory_adapters import Memory, MemoryAdapterConfig, inject_memory, load_memory
from tests.support.changed_files import (
    CONFIGS,
    FACT,
    changed,
    refused,
    save_each,
    settings_file,
)
from tests.support.contract import logits
from tests.support.models import ARCHITECTURES, byte_tokenizer, tiny_model

methods = pytest.mark.parametrize("method", CONFIGS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a memory of a method."""
    folder = save_each(tmp_path_factory.mktemp("saved"))
    return lambda method: folder / method


@methods
def test_another_middle_block(saved: Callable[[str], Path], method: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.neg_()
    refused(saved(method), "another base model: its `all_blocks`", model)


@methods
def test_more_embeddings_change_nothing(tmp_path: Path, method: str) -> None:
    def large() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**ARCHITECTURES["llama"] | {"vocab_size": 1100})).eval()

    memory: Any = inject_memory(large(), CONFIGS[method](), tokenizer=byte_tokenizer())
    if method != "residual":
        memory.write(FACT, progress=False)
    memory.save_pretrained(tmp_path)
    model = large()
    model.resize_token_embeddings(1200, mean_resizing=False)
    load_memory(model, tmp_path, tokenizer=byte_tokenizer())
    torch.testing.assert_close(logits(model)[..., :1100], logits(memory.model), rtol=1e-5, atol=1e-5)


def lowercase(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def compatibility(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()


def decomposed(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFD()


def bos(tokenizer: Any) -> None:
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template


def added(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.add_tokens(["Ġ"])  # the token of a space, cut off before all else now


def template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"


@methods
@pytest.mark.parametrize("change", [lowercase, compatibility, decomposed])
def test_a_tokenizer_that_cuts_text_otherwise(saved: Callable[[str], Path], method: str, change: Any) -> None:
    tokenizer = byte_tokenizer(chat=True)
    change(tokenizer)
    refused(saved(method), "another tokenizer: its `tokenizer` is", tokenizer=tokenizer)


@methods
@pytest.mark.parametrize(
    ("change", "field"), [(bos, "special_tokens"), (added, "added_tokens"), (template, "chat_template")]
)
def test_a_tokenizer_with_other_habits(saved: Callable[[str], Path], method: str, change: Any, field: str) -> None:
    tokenizer = byte_tokenizer(chat=True)
    change(tokenizer)
    with pytest.warns(UserWarning, match=f"tokenizer's `{field}` is not what it was"):
        load_memory(tiny_model(), saved(method), tokenizer=tokenizer)


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_precision_is_no_mismatch(saved: Callable[[str], Path], method: str, dtype: torch.dtype) -> None:
    memory = load_memory(tiny_model(dtype=dtype), saved(method), tokenizer=byte_tokenizer(chat=True))
    assert logits(memory.model).isfinite().all()


@methods
def test_versions(saved: Callable[[str], Path], tmp_path: Path, method: str) -> None:
    folder = saved(method)
    name = settings_file(folder)
    refused(changed(folder, tmp_path, name, file_format=3), "`file_format` is 3.*update memory-adapters")
    refused(changed(folder, tmp_path, name, file_format=1), "`file_format` is 1.*write it again")
    refused(
        changed(folder, tmp_path, name, new_in_2030=1, peft_version="9.9"), "new_in_2030.*newer version.*its is '9.9'"
    )
    load_memory(tiny_model(), changed(folder, tmp_path, name, peft_version="9.9"))
    older = {k: v for k, v in json.loads((folder / name).read_text()).items() if k != "file_format"}
    (tmp_path / name).write_text(json.dumps(older))
    load_memory(tiny_model(), tmp_path)


@methods
def test_a_file_that_names_no_base(saved: Callable[[str], Path], tmp_path: Path, method: str) -> None:
    folder = saved(method)
    found = json.loads((folder / settings_file(folder)).read_text())["base_fingerprint"]
    unmarked = {key: value for key, value in found.items() if key == "tokenizer"}
    for fields in (None, unmarked):
        changed(folder, tmp_path, settings_file(folder), base_fingerprint=fields)
        with pytest.warns(UserWarning, match="does not say which base model it belongs to"):
            load_memory(tiny_model(), tmp_path)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf"), True, "1"])
@pytest.mark.parametrize("field", ["weight", "gate_init", "norm_cap", "learning_rate", "key_threshold"])
def test_numbers_that_are_none(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}` must be a finite number"):
        MemoryAdapterConfig(**{field: value})


def test_an_activation_with_parameters_is_none_that_is_saved() -> None:
    with pytest.raises(ValueError, match="has parameters of its own"):
        MemoryAdapterConfig(activation="prelu")


@pytest.mark.parametrize("training", [False, True])
def test_dropout_follows_the_mode_of_the_model(tmp_path: Path, training: bool) -> None:
    config = MemoryAdapterConfig(layers=[1], memory_dim=8, token_gate="none", gate_init=0.5, dropout=0.5)
    inject_memory(tiny_model(), config).save_pretrained(tmp_path)
    model = tiny_model().train(training)
    load_memory(model, tmp_path)
    assert torch.equal(logits(model), logits(model)) != training


@methods
def test_a_base_that_was_changed_meanwhile(method: str) -> None:
    model = tiny_model()
    memory: Memory = inject_memory(model, CONFIGS[method](), tokenizer=byte_tokenizer(chat=True))
    weight = model.model.layers[3].self_attn.o_proj.weight
    with torch.no_grad():
        weight.neg_()
    with pytest.raises(ValueError, match="The base model has changed since 'knowledge' was injected"):
        memory.write(FACT)
    with torch.no_grad():
        weight.neg_()
    memory._check_writable()


def test_a_lora_merged_for_a_while() -> None:
    model: Any = tiny_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False), "style")
    memory = inject_memory(model, CONFIGS["residual"](), tokenizer=byte_tokenizer())
    layers = [module for module in model.modules() if hasattr(module, "merge") and hasattr(module, "lora_A")]
    for layer in layers:
        layer.merge(adapter_names=["style"])
    with pytest.raises(ValueError, match=r"Undo the change \(such as with `unmerge_adapter\(\)`\)"):
        memory.write("Some text.")
    for layer in layers:
        layer.unmerge()
    memory._check_writable()


@methods
def test_what_belongs_together_loads_without_a_word(saved: Callable[[str], Path], method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_memory(tiny_model(), saved(method), tokenizer=byte_tokenizer(chat=True))


@methods
def test_another_head(method: str, tmp_path: Path) -> None:
    """An output projection of its own, as in a base that was trained on without its embeddings."""
    model = tiny_model()
    model.config.tie_word_embeddings = False
    memory = inject_memory(model, CONFIGS[method](), tokenizer=byte_tokenizer())
    memory.save_pretrained(tmp_path)
    other = tiny_model()
    with torch.no_grad():
        other.lm_head.weight.neg_()
    assert other.lm_head.weight is not other.model.embed_tokens.weight
    refused(tmp_path, "another base model: its `head`", other)


def test_a_memory_that_is_there_already(tmp_path: Path) -> None:
    for method, config in CONFIGS.items():
        model = tiny_model()
        memory: Any = inject_memory(model, config(), tokenizer=byte_tokenizer())
        if method != "residual":
            memory.write(FACT, progress=False)
        memory.save_pretrained(tmp_path / method)
        with pytest.warns(UserWarning, match="'knowledge_2' duplicates 'knowledge', already on.*applied twice"):
            twin: Any = load_memory(model, tmp_path / method, tokenizer=byte_tokenizer())
        twin.remove()
        memory.remove()
        load_memory(model, tmp_path / method)


def test_slots_of_one_encoder_are_no_twins(tmp_path: Path) -> None:
    model = tiny_model()
    memory: Any = inject_memory(model, CONFIGS["slots"](), tokenizer=byte_tokenizer())
    memory.save_pretrained(tmp_path)
    load_memory(model, tmp_path, tokenizer=byte_tokenizer())
    memory.write("Some text.", progress=False)
    load_memory(model, tmp_path)
