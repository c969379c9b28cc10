"""Files: whole or not at all, checked before they are believed, the same bytes for the same memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from memory_adapters import MemoryAdapterConfig, inject_memory, load_memory, memories
from memory_adapters.base_model.fingerprint import base_fingerprint
from memory_adapters.files.atomic import atomic_directory
from memory_adapters.files.tensors import write_tensors
from tests.support.contract import fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def config() -> MemoryAdapterConfig:
    return MemoryAdapterConfig(layers=[1, 2], memory_dim=4, token_gate="none", gate_init=0.5)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_model()
    inject_memory(model, config(), tokenizer=byte_tokenizer()).save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"


def test_golden_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    write_tensors(tmp_path / "x", tensors)
    data = (tmp_path / "x").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {
        "format": "pt",
        "sha256": "0aac52593bc8842cdcb222da72745368c114618ff2ade59d2d984b238949c27d",
    }
    assert header["b"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    assert header["a"] == {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]}
    assert data[-28:] == bytes.fromhex("00000000 0000803f 00000040 00004040 00008040 0000a040 c03f00c0")
    assert hashlib.sha256(data).hexdigest() == "b2f56e9a00c8287a6b8f99a1278fccb3304f4cf295897280efa1f3b4766df463"


def test_same_memory_same_bytes(saved: Path, tmp_path: Path) -> None:
    model = tiny_model()
    load_memory(model, saved, tokenizer=byte_tokenizer()).save_pretrained(tmp_path / "again")
    for name in (WEIGHTS, CONFIG, "README.md"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_tensor_names_are_pefts(saved: Path) -> None:
    names = {name.rpartition(".")[0] for name in load_file(saved / WEIGHTS)}
    assert names == {f"base_model.model.model.layers.{i}.residual_memory.memory_adapter_mlp" for i in (1, 2)}


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def retensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return alter


def reconfigure(**values: object) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        text = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(text | values))

    return alter


KEY = "base_model.model.model.layers.1.residual_memory.memory_adapter_mlp.up"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncate, ValueError, "is damaged"),
        (flip_a_bit, ValueError, "was changed"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), ValueError, "is damaged"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), ValueError, "is damaged"),
        (retensor(lambda t: t.pop(KEY)), ValueError, "missing"),
        (retensor(lambda t: t.update(extra=torch.ones(1))), ValueError, "unexpected"),
        (retensor(lambda t: t.update({KEY: torch.ones(4, 31)})), ValueError, "describes floats of shape"),
        (retensor(lambda t: t.update({KEY: torch.ones(4, 32, dtype=torch.int64)})), ValueError, "I64"),
        (retensor(lambda t: t.update({KEY: torch.full((4, 32), float("nan"))})), ValueError, "NaN"),
        (reconfigure(memory_width=3), ValueError, "Unknown config field"),
        (reconfigure(memory_dim=5), ValueError, "describes floats of shape"),
        (reconfigure(memory_dim="big"), ValueError, "`memory_dim`"),
        (reconfigure(layers=[1, 40]), ValueError, "`layers`"),
        (reconfigure(peft_type="LORA"), ValueError, "no memory method"),
        (reconfigure(peft_type=["LORA"]), ValueError, "no memory method"),
        (lambda f: (f / CONFIG).write_text("{"), ValueError, "not valid JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), ValueError, "no memory method"),
        (lambda f: (f / CONFIG).unlink(), FileNotFoundError, CONFIG),
        (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, WEIGHTS),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), FileNotFoundError, WEIGHTS),
    ],
)
def test_damage_is_refused_and_changes_nothing(
    saved: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(saved)
    model = tiny_model()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        load_memory(model, saved, tokenizer=byte_tokenizer())
    assert fingerprint(model) == before
    assert not memories(model)


def test_memory_of_another_model(saved: Path) -> None:
    for other, field in ((tiny_model("qwen2"), "model_type"), (tiny_model(seed=1), "embeddings")):
        before = fingerprint(other)
        with pytest.raises(ValueError, match=rf"another base model: its `{field}` is .*, the one given has"):
            load_memory(other, saved)
        with pytest.raises(ValueError, match="another base model"):
            PeftModel.from_pretrained(other, saved)
        assert not memories(other)
        assert fingerprint(other)[0] == before[0]


def test_memory_of_another_tokenizer(saved: Path) -> None:
    class Shouting:
        eos_token_id = 2

        def get_vocab(self) -> dict[str, int]:
            return byte_tokenizer().get_vocab()

        def __call__(self, text: str, **kwargs: object) -> object:
            return byte_tokenizer()(text.upper(), **kwargs)

    model = tiny_model()
    with pytest.raises(ValueError, match="another tokenizer"):
        load_memory(model, saved, tokenizer=Shouting())
    assert not memories(model)


def test_tokenizer_with_ids_beyond_the_model() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match="`tokenizer` does not belong to this model"):
        inject_memory(tiny_model(), config(), tokenizer=tokenizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_base_may_come_in_another_precision(saved: Path, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    base = logits(model)
    memory = load_memory(model, saved, tokenizer=byte_tokenizer())
    assert not torch.equal(logits(model), base)
    assert {tensor.dtype for tensor in memory.state_dict().values()} == {torch.float32}


def test_fingerprint_does_not_see_adapters() -> None:
    model = tiny_model()
    plain = base_fingerprint(model)
    inject_memory(model, config())
    assert base_fingerprint(model) == plain
    assert base_fingerprint(tiny_model(seed=1)) != plain


def test_peft_loads_ours_and_we_load_pefts(saved: Path, tmp_path: Path) -> None:
    ours = tiny_model()
    load_memory(ours, saved)
    wrapped = PeftModel.from_pretrained(tiny_model(), saved)
    assert torch.equal(logits(wrapped), logits(ours))  # type: ignore[arg-type]
    plain = tiny_model()
    plain.load_adapter(str(saved), adapter_name="kept")
    assert torch.equal(logits(plain), logits(ours))
    fresh = get_peft_model(tiny_model(), config())  # type: ignore[arg-type]
    fresh.save_pretrained(tmp_path / "pefts")
    again = tiny_model()
    load_memory(again, tmp_path / "pefts")
    assert torch.equal(logits(again), logits(fresh))  # type: ignore[arg-type]


def test_a_failed_save_leaves_the_previous(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail() -> None:
        with atomic_directory(saved) as staging:
            (staging / CONFIG).write_text("new")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="full"):
        fail()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_saving_where_it_cannot_be(tmp_path: Path) -> None:
    memory = inject_memory(tiny_model(), config())
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="give a folder"):
        memory.save_pretrained(tmp_path / "file")
    for path in ("./nowhere", str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="not a folder"):
            load_memory(tiny_model(), path)


def test_files_are_as_readable_as_any_other(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "any").write_text("")
    assert {path.stat().st_mode for path in saved.iterdir()} == {(tmp_path / "any").stat().st_mode}
