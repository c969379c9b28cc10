"""Altered files load as what they are or are refused by name, and a refused file changes no model."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.activations import ACT2FN

from memory_adapters import Covariance, MemoryAdapterConfig, MemorySlots, load_memory
from memory_adapters.files.item_files import read_items
from memory_adapters.files.strict_json import JSON_BYTES, parse_json, read_json
from memory_adapters.files.tensors import HEADER_BYTES, read_metadata, read_tensors
from memory_adapters.inject import read_config
from tests.support.contract import fingerprint
from tests.support.hostile import Evil, Reader
from tests.support.models import byte_tokenizer, tiny_model

PARTS = [
    *(f"{method} {kind}" for method in ("residual", "edit", "slots") for kind in ("config", "files")),
    *("slots file", "covariance", "collection index", "LoRA config", "items"),
]
WHOLE = ["residual memory", "edit memory", "slots memory", "collection"]
EXAMPLES = {**dict.fromkeys(PARTS, 60), **dict.fromkeys(WHOLE, 24)}

nested: Any = []
for _ in range(100):
    nested = [nested]
NUMBERS = [0, 1, -1, 3, 0.5, 1e308, float("nan"), float("inf"), 1 << 31, 1 << 53, (1 << 64) - 1, -(1 << 63)]
TEXTS = ["", "a", "\ud800", "../../x", "/etc/passwd", "x" * 100_000, "(a+)+$", "xielu", "LORA", "MEMIT", "pissa", "I64"]
LISTS = [[], nested, [None], [1, 1], [1.5], list(range(50_000)), ["q_proj"] * 300, [[0, 1_000_000]]]
FACT = {"prompt": "a b", "subject": "a", "target": "b"}
VALUES = st.sampled_from([None, True, *NUMBERS, *TEXTS, *LISTS, {}, {"a": {"b": {}}}, [FACT, FACT]])
NAMES = st.sampled_from(
    ["auto_mapping", "megatron_core", "rank_pattern", "peft_type", "self", "", "a.b", "sha256", "layer.01"]
)


@st.composite
def altered_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes flipped, cut out, inserted, or replaced by a pickle."""
    start, end = sorted(draw(st.lists(st.integers(0, len(data)), min_size=2, max_size=2)))
    flipped = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[start : start + 1])
    inserted = draw(st.sampled_from([b"\0", b" ", b"{}", bytes(4096)]))
    return draw(
        st.sampled_from(
            [
                data[:start] + flipped + data[start + 1 :],
                data[:start],
                data[:start] + data[end:],
                data[:start] + inserted + data[start:],
                pickle.dumps(Evil()),
            ]
        )
    )


@st.composite
def altered_value(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which one inner value is replaced, removed, repeated or renamed."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    changed = value.copy()
    how = draw(st.sampled_from(["inner", "inner", "inner", "remove", "rename"]))
    if how == "inner":
        changed[key] = draw(altered_value(value[key]))
    elif how == "remove":
        del changed[key]
    elif isinstance(changed, dict):
        changed[draw(NAMES)] = changed.pop(key)
    else:
        changed *= draw(st.sampled_from([2, 1000]))
    return changed


@st.composite
def altered_json(draw: st.DrawFn, data: bytes) -> bytes:
    text = json.dumps(draw(altered_value(json.loads(data))))
    twice = draw(st.booleans()) and draw(st.booleans()) and text.startswith("{")
    return (f'{{"peft_type": 1, {text[1:]}' if twice else text).encode()


@st.composite
def altered_tensors(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file with another header, of the right length or another."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name in draw(st.sets(st.sampled_from(["sha256", "edit"]))):
        header.get("__metadata__", {}).pop(name, None)  # so that the checks behind these are reached
    if draw(st.booleans()):
        header = draw(altered_value(header))
    text = json.dumps(header).encode()
    lengths = [len(text)] * 4 + [0, len(text) + 1, 1 << 24, 1 << 63]
    return draw(st.sampled_from(lengths)).to_bytes(8, "little") + text + data[8 + length :]


def altered(file: str, data: bytes) -> st.SearchStrategy[bytes]:
    """Other contents for a file of this name."""
    if file.endswith(".jsonl"):
        lines = data.split(b"\n")
        return st.one_of(altered_bytes(data), altered_json(lines[0]).map(lambda line: b"\n".join([line, *lines[1:]])))
    return st.one_of(altered_bytes(data), altered_json(data) if file.endswith(".json") else altered_tensors(data))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    torch.manual_seed(0)
    return Reader(tmp_path_factory.mktemp("files"))


@pytest.fixture
def saved(reader: Reader, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the reader's folders."""
    return lambda name: Path(shutil.copytree(reader.folder / name, tmp_path / name))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_altered_file_is_valid_or_refused_and_changes_no_model(reader: Reader, name: str) -> None:
    @settings(max_examples=EXAMPLES[name], deadline=None, database=None, derandomize=True)
    @given(st.data())
    def run(choose: st.DataObject) -> None:
        file = choose.draw(st.sampled_from(reader.targets[name].files))
        with reader.altered(name, file, choose.draw(altered(file, reader.originals[name][file]))):
            reader.outcome(name)

    run()


@pytest.mark.parametrize("name", EXAMPLES)
def test_files_as_they_were_saved_are_read(reader: Reader, name: str) -> None:
    assert reader.outcome(name) == "the same"


@pytest.mark.parametrize(
    "text", ["[NaN]", "[1e999]", '{"a":1,"a":1}', '["\\ud800"]', "[" * 17 + "]" * 17, "[" * 99999, "1" * 9999]
)
def test_json_is_read_by_the_letter(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text)
    assert parse_json("[" * 16 + "]" * 16)


def test_sizes_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.write((1 << 40).to_bytes(8, "little") + b"{")
        file.truncate(1 << 41)  # sparse: two tebibytes that take no space
    for read in (read_json, read_metadata):
        with pytest.raises(ValueError, match="at most"):
            read(huge)
    huge.write_bytes((HEADER_BYTES + 1).to_bytes(8, "little") + bytes(HEADER_BYTES + 1))
    with pytest.raises(ValueError, match="at most 16,777,216"):
        read_metadata(huge)
    with huge.open("wb") as file:
        file.truncate(JSON_BYTES + 1)
    with pytest.raises(ValueError, match="at most 67,108,864"):
        read_json(huge)


def test_no_activation_imports_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xielu").mkdir()
    (tmp_path / "xielu" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    made = []
    for name in ACT2FN:
        with suppress(ValueError):
            made.append(MemoryAdapterConfig(activation=name).activation)
    assert {"prelu", "xielu"}.isdisjoint(made)
    assert {"gelu", "silu", "relu"} <= set(made)


def test_no_count_in_a_config_is_allocated(reader: Reader) -> None:
    for method, counts in (
        ("edit", ("num_prefixes", "steps", "batch_tokens", "covariance_tokens", "prefix_length", "seed")),
        ("residual", ("memory_dim", "num_keys", "num_prefixes", "batch_size", "max_length", "min_steps", "seed")),
        ("slots", ("num_slots", "span_length", "lora_rank", "refine_steps", "encoder_steps", "seed")),
    ):
        name = f"{method} files"
        file = reader.targets[name].files[1]
        values = json.loads(reader.originals[name][file])
        for count in counts:
            for number in (1 << 40, 1 << 53, 1 << 63):  # a tebibyte would not fit
                with reader.altered(name, file, json.dumps(values | {count: number}).encode()):
                    reader.outcome(name)


@pytest.mark.parametrize("fields", [[], {"a": []}, {"a": True}, {"a": "x" * 5000}, {"x" * 500: "a"}, {"a": {"b": 1}}])
def test_a_fingerprint_is_short(reader: Reader, tmp_path: Path, fields: Any) -> None:
    values = json.loads(reader.originals["residual config"]["adapter_config.json"])
    (tmp_path / "config").write_text(json.dumps(values | {"base_fingerprint": fields}))
    with pytest.raises(ValueError, match="`base_fingerprint` must have a text or a whole number"):
        read_config(tmp_path / "config")


def test_tensors_too_large_for_float32_are_refused(tmp_path: Path) -> None:
    for number in (1e300, float("inf"), float("nan")):
        save_file({"a": torch.tensor([1.0, number], dtype=torch.float64)}, tmp_path / "x")
        with pytest.raises(ValueError, match="too large for float32"):
            read_tensors(tmp_path / "x", {"a": torch.Size([2])})


def test_what_is_read_is_no_view_of_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "x")
    found = read_tensors(tmp_path / "x", {"a": torch.Size([4])})["a"]
    with (tmp_path / "x").open("r+b") as file:
        file.write(bytes(200))
    assert found.tolist() == [1] * 4


@pytest.mark.parametrize("method", ["residual", "edit", "slots"])
@pytest.mark.parametrize("value", [None, True, -1, 1 << 60, 1e999, "x", "x" * 5000, [], [[]], {"a": {}}, ["\n"], 0.5])
def test_every_field_of_every_config_has_its_type(reader: Reader, tmp_path: Path, method: str, value: Any) -> None:
    folder = reader.folder / f"{method} config"
    (file,) = reader.targets[f"{method} config"].files
    original = json.loads((folder / file).read_text())
    for field in original:
        (tmp_path / file).write_text(json.dumps(original | {field: value}))
        try:
            config = read_config(tmp_path / file)
        except ValueError as error:
            told = str(error)
            assert f"`{tmp_path / file}`" in told
            assert len(told) < 1500
            continue
        got, kind = config.to_dict()[field], type(original[field])
        numbers = kind in (int, float) and type(got) in (int, float) and field in ("lora_alpha", *floats(config))
        same = type(got) is kind or got is None or original[field] is None or numbers
        assert same or field in ("layers", "auto_mapping", "peft_type"), (field, value, got)


def floats(config: Any) -> list[str]:
    return [field.name for field in fields(config) if "float" in str(field.type)]


def test_slots_and_covariance_by_other_names(saved: Callable[[str], Path], tmp_path: Path) -> None:
    slots, covariance = saved("slots file") / "slots.safetensors", saved("covariance") / "covariance.safetensors"
    with pytest.raises(ValueError, match="not a saved covariance"):
        Covariance.load(slots)
    with pytest.raises(ValueError, match="not a file of slots"):
        MemorySlots.load(covariance)
    with pytest.raises(ValueError, match="for a repository on the Hub"):
        MemorySlots.load(slots, revision="v2")
    with pytest.raises(ValueError, match="for a repository on the Hub"):
        load_memory(tiny_model(), saved("residual memory"), revision="v2")


def test_items_of_any_length_take_linear_time(tmp_path: Path) -> None:
    file = tmp_path / "items.json"
    file.write_text("[\n" + ",\n".join(['{"text": "a"}'] * 50_000) + ',\n{"text": 1}]')
    start = time.process_time()
    with pytest.raises(ValueError, match=r"line 50002"):
        read_items(file)
    assert time.process_time() - start < 10


def test_a_failed_load_leaves_the_model(saved: Callable[[str], Path]) -> None:
    folder, model = saved("slots memory"), tiny_model()
    before = fingerprint(model)
    text = re.sub(
        rb'"embeddings\\": \\"[0-9a-f]{8}', rb'"embeddings\\": \\"00000000', (folder / "slots.safetensors").read_bytes()
    )
    (folder / "slots.safetensors").write_bytes(text)
    with pytest.raises(ValueError, match="another base model"):
        load_memory(model, folder, tokenizer=byte_tokenizer())
    assert fingerprint(model) == before
