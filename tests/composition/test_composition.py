"""What composes with what: every pair of adapters, in both orders, by subsets, saved together and apart."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig, EvaConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from peft.tuners.lora.config import VeloraConfig
from transformers import PreTrainedModel

from memory_adapters import (
    inject_memory,
    load_adapters,
    load_memory,
    memories,
    merge_lora,
    save_adapters,
    use_adapters,
    use_adapters_by_row,
)
from tests.composition import test_training_together
from tests.reliability.operations import files_of
from tests.support.composing import KINDS, SUITES, lora_config, put
from tests.support.contract import PROMPT, encode, fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

PAIR = ("first", "second")
pairs = pytest.mark.parametrize(PAIR, [(a, b) for a in KINDS for b in KINDS])
methods = pytest.mark.parametrize("kind", KINDS[1:])
PEFT_SAYS = "ignore:Already found a `peft_config`:UserWarning"  # of every second adapter


def both(first: str, second: str) -> PreTrainedModel:
    model = tiny_model()
    put(model, first, "one", 1)
    put(model, second, "two", 2)
    return model


def on_its_own(kind: str, name: str, seed: int) -> torch.Tensor:
    model = tiny_model()
    put(model, kind, name, seed)
    return logits(model)


@pairs
@pytest.mark.filterwarnings(PEFT_SAYS)
def test_any_subset_can_be_active_and_each_is_removed_separately(first: str, second: str) -> None:
    model = both(first, second)
    base, together = logits(tiny_model()), logits(model)
    expected = {"one": on_its_own(first, "one", 1), "two": on_its_own(second, "two", 2)}
    assert not torch.equal(together, expected["one"])
    assert not torch.equal(together, expected["two"])
    with use_adapters(model, []):
        assert torch.equal(logits(model), base)
    for name, only in expected.items():
        with use_adapters(model, [name]):
            assert torch.equal(logits(model), only)
    with use_adapters(model, ["one", "two"]):
        assert torch.equal(logits(model), together)
    assert torch.equal(logits(model), together)
    for memory in memories(model).values():
        with memory.disabled():
            assert torch.equal(logits(model), expected["two" if memory.adapter_name == "one" else "one"])
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), together)
    for name, memory in list(memories(model).items()):
        other = "two" if name == "one" else "one"
        if other in model.peft_config:
            memory.remove()
            assert torch.equal(logits(model), expected[other])


@pairs
@pytest.mark.parametrize("order", ["as saved", "the other way round"])
@pytest.mark.filterwarnings(PEFT_SAYS)
def test_saved_together_and_apart_and_loaded_in_any_order(first: str, second: str, order: str, tmp_path: Path) -> None:
    model = both(first, second)
    together = logits(model)
    save_adapters(model, tmp_path)
    other = tiny_model()
    if order == "as saved":
        assert list(load_adapters(other, tmp_path, tokenizer=byte_tokenizer())) == list(memories(model))
        assert torch.equal(logits(other), together)
        return
    kinds = {"one": first, "two": second}
    for name in ("two", "one"):
        if kinds[name] == "lora":
            silenced = "memit" in kinds.values() and name == "one"
            with pytest.warns(UserWarning, match="switched off the memory") if silenced else nullcontext():
                other.load_adapter(str(tmp_path / name), adapter_name=name)
        else:
            load_memory(other, tmp_path / name, adapter_name=name)
    with use_adapters(other, ["one", "two"]):
        assert torch.equal(logits(other), together)


@methods
@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.filterwarnings(PEFT_SAYS)
def test_a_lora_is_merged_while_a_memory_stays(kind: str, lora_first: bool, tmp_path: Path) -> None:
    model = both("lora", kind) if lora_first else both(kind, "lora")
    lora, name = ("one", "two") if lora_first else ("two", "one")
    together = logits(model)
    with use_adapters(model, [lora]):
        only_lora = logits(model)
    assert merge_lora(model, lora) is model
    assert list(model.peft_config) == [name]
    torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-5)
    merged = logits(model)
    memory = memories(model)[name]
    with memory.disabled():
        torch.testing.assert_close(logits(model), only_lora, rtol=1e-4, atol=1e-5)
    memory.save_pretrained(tmp_path)
    memory.remove()
    assert fingerprint(model)[::2] == fingerprint(tiny_model())[::2]  # keys, modules, attributes
    load_memory(model, tmp_path)
    assert torch.equal(logits(model), merged)
    with pytest.raises(ValueError, match="another base model"):
        load_memory(tiny_model(), tmp_path)


@methods
@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.filterwarnings(PEFT_SAYS)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_inside_a_peft_model(kind: str, lora_first: bool, tmp_path: Path) -> None:
    model = tiny_model()
    base = logits(model)
    if not lora_first:
        put(model, kind, "two", 2)
    torch.manual_seed(1)
    silenced = kind == "memit" and not lora_first
    with pytest.warns(UserWarning, match="switched off the memory 'two'") if silenced else nullcontext():
        wrapped: Any = get_peft_model(model, lora_config())
    if lora_first:
        put(model, kind, "two", 2)
    memory = memories(wrapped)["two"]
    assert memory.active is not silenced
    memory.active = True
    together = logits(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), base)
    assert torch.equal(logits(wrapped), together)
    with memory.disabled():
        only_lora = logits(wrapped)
    with use_adapters(wrapped, ["two"]):
        assert torch.equal(logits(wrapped), on_its_own(kind, "two", 2))
    wrapped.save_pretrained(tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    save_adapters(wrapped, tmp_path / "all")
    other = tiny_model()
    load_adapters(other, tmp_path / "all", tokenizer=byte_tokenizer())
    with use_adapters(other, ["default", "two"]), use_adapters(model, ["default", "two"]):
        assert torch.equal(logits(other), logits(wrapped))
    memory.remove()
    assert torch.equal(logits(wrapped), only_lora)
    assert list(wrapped.peft_config) == ["default"]


@methods
def test_pefts_own_merge_leaves_no_memory_behind_unseen(kind: str) -> None:
    """It merges every active LoRA, edits too, and drops the others; what it leaves in place can still be taken out."""
    wrapped = get_peft_model(tiny_model(), lora_config())
    memory = inject_memory(wrapped, SUITES[kind].make_config(), tokenizer=byte_tokenizer())
    SUITES[kind].fill(memory)
    together = logits(wrapped)  # type: ignore[arg-type]
    model = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-5)
    if kind == "memit":
        assert not memory.attached
        assert memories(model) == {}
        return
    assert memories(model) == {"knowledge": memory}
    if kind == "slots":
        with pytest.raises(RuntimeError, match="removed with another LoRA"):
            memory.write("some text")
    memory.remove()
    assert not torch.equal(logits(model), together)
    assert fingerprint(model)[::2] == fingerprint(tiny_model())[::2]  # keys, modules, attributes


def test_what_cannot_be_merged_changes_nothing() -> None:
    model = both("lora", "slots")
    together = logits(model)
    for name in ("two", "three"):
        with pytest.raises(ValueError, match="is no LoRA that can be merged"):
            merge_lora(model, name)
    with torch.no_grad():
        next(m for n, m in model.named_modules() if n.endswith("lora_A.one")).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        merge_lora(model, "one")
    with use_adapters(model, []):
        assert torch.equal(logits(model), logits(tiny_model()))
    assert not torch.equal(together, logits(tiny_model()))


@pairs
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.filterwarnings(PEFT_SAYS)
def test_another_adapter_for_each_row(first: str, second: str, beams: int) -> None:
    model = both(first, second)
    settings = dict(max_new_tokens=6, do_sample=False, num_beams=beams)
    expected = {}
    for name in ("one", "two", "__base__"):
        with use_adapters(model, [name] if name != "__base__" else []):
            expected[name] = model.generate(**encode(PROMPT), **settings)[0]
    rows = ["two", "__base__", "one", "two"]
    with use_adapters_by_row(model, rows):
        got = model.generate(**encode(*[PROMPT] * 4), **settings)
    for row, name in zip(got, rows, strict=True):
        assert torch.equal(row, expected[name])
    together = logits(model)
    with use_adapters_by_row(model, ["__base__"]):
        assert torch.equal(logits(model), logits(tiny_model()))
    assert torch.equal(logits(model), together)


def test_names_that_are_wrong_and_matrices_that_are_shared() -> None:
    model = both("lora", "memit")
    for context in (use_adapters, use_adapters_by_row):
        with (
            pytest.raises(ValueError, match=r"`adapter_names` has \['three'\], but the adapters are \['one', 'two'\]"),
            context(model, ["three"]),
        ):
            raise AssertionError("unreachable")
    with (
        pytest.raises(ValueError, match=r"\['two'\], but \['one'\] is active on the same matrices"),
        use_adapters_by_row(model, ["two", "__base__"]),
    ):
        raise AssertionError("unreachable")
    model = both("residual", "memit")
    with pytest.raises(ValueError, match="2 entries for a batch of 3"), use_adapters_by_row(model, ["one", "two"]):
        logits(model, "a", "b", "c")


def test_a_damaged_collection_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = both("residual", "slots")
    save_adapters(model, tmp_path)
    (tmp_path / "two" / "adapter_model.safetensors").write_bytes(b"damaged")
    other = tiny_model()
    before = fingerprint(other)
    with pytest.raises(ValueError, match="damaged"):
        load_adapters(other, tmp_path)
    assert fingerprint(other) == before
    with pytest.raises(FileNotFoundError, match=r"adapters\.json"):
        load_adapters(other, tmp_path / "one")
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapters(other, tmp_path / "new")


LORAS: dict[str, dict[str, Any]] = {
    **{f"init {kind}": {"init_lora_weights": kind} for kind in (True, "gaussian", "orthogonal", "mica")},
    "init eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.5)},
    "parameters": {"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]},
    "modules and parameters": {"target_parameters": ["mlp.down_proj.weight", "mlp.up_proj.weight"]},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    "saved module": {"modules_to_save": ["lm_head"]},
    "patterns": {"target_modules": r".*layers\.[12]\..*(q|v)_proj", "rank_pattern": {"q_proj": 3}, "lora_dropout": 0.5},
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_is_loaded_as_it_was(name: str, tmp_path: Path) -> None:
    model = tiny_model()
    model.add_adapter(LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"]} | LORAS[name]), "style")
    model.eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "style" in path.split("."):
                parameter.add_(torch.randn_like(parameter) / 10)
    assert not torch.equal(logits(model), logits(tiny_model()))
    save_adapters(model, tmp_path)
    other = tiny_model()
    load_adapters(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    loaded, saved = (one.peft_config["style"].to_dict() for one in (other, model))
    assert loaded.pop("eva_config") == (saved.pop("eva_config") or None)
    assert loaded == saved | {"inference_mode": True}
    other.disable_adapters()
    assert torch.equal(logits(other), logits(tiny_model()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(init_lora_weights="pissa"), "`init_lora_weights='pissa'` changed the weights of the base model"),
        (LoraConfig(init_lora_weights="olora"), "merge it with `merge_lora`, or convert it with PEFT's"),
        (LoraConfig(layer_replication=[[0, 2], [1, 3]]), "`layer_replication=.*` adds layers to the base model"),
        (LoraConfig(target_modules=r"(.*\.)+(q|v)_proj"), "`target_modules=.*` could take very long to search for"),
        (LoraConfig(velora_config=VeloraConfig()), "`velora_config=.*` may make PEFT import, open or build something"),
        (OFTConfig(oft_block_size=4), "has .*oft_R.rows.*, which are not floats"),
        (BOFTConfig(boft_block_size=4), "does not fit this model"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PEFT's own, of these methods
def test_what_could_not_be_loaded_is_not_saved(config: PeftConfig, message: str, tmp_path: Path) -> None:
    model = tiny_model()
    put(model, "residual", "one", 1)
    save_adapters(model, tmp_path)
    before = files_of(tmp_path)
    config.target_modules = config.target_modules or ["q_proj", "v_proj"]  # type: ignore[attr-defined]
    model.add_adapter(config, "style")
    with pytest.raises(ValueError, match=message):
        save_adapters(model, tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in KINDS[1:] for b in KINDS[1:]])
def test_a_memory_saved_over_one_of_another_method_is_what_loads(first: str, second: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for kind, seed in ((first, 1), (second, 2)):
        model = tiny_model()
        memory = put(model, kind, "one", seed)
        assert memory is not None
        memory.save_pretrained(tmp_path)
    other = tiny_model()
    assert type(load_memory(other, tmp_path)) is type(memory)
    assert torch.equal(logits(other), logits(model))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_documented_table_is_what_is_tested() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "compose.md").read_text(encoding="utf-8").splitlines()
    header, *rows = [[c.strip() for c in line[1:-1].split("|")] for line in lines if line.startswith("| ")][:6]
    short = {"LoRA": "lora", "MEMIT": "memit"}
    columns = [tuple(short.get(kind, kind) for kind in cell.split(" + ")) for cell in header[1:-1]]
    assert {frozenset(pair) for pair in columns} == {frozenset((a, b)) for a in KINDS for b in KINDS}
    assert len(rows) == 5
    for _, *cells, name in rows:
        test = globals().get(name) or getattr(test_training_together, name)
        (given,) = [m.args for m in test.pytestmark if m.name == "parametrize" and m.args[0] in (PAIR, "kind")]
        both_ways = given[1] if given[0] == PAIR else [("lora", kind) for kind in given[1]]
        tested = {frozenset(pair) for pair in both_ways}
        for pair, cell in zip(columns, cells, strict=True):
            assert (cell in ("exact", "close")) == (frozenset(pair) in tested), (name, pair)
