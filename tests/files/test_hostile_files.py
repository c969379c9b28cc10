"""Altered files are read as what they are or refused by name, in bounded time and memory, and nothing in them is run.

`benchmarks/fuzz.py` makes more of these alterations, and for longer.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.activations import ACT2FN

from memory_adapters import Covariance, MemoryAdapterConfig, MemorySlots, load_memory
from memory_adapters.files.item_files import read_items
from memory_adapters.files.strict_json import JSON_BYTES, parse_json, read_json
from memory_adapters.files.tensors import HEADER_BYTES, read_metadata, read_tensors
from memory_adapters.inject import read_config
from tests.support.alterations import Evil, altered_file
from tests.support.contract import fingerprint
from tests.support.hostile import Reader
from tests.support.models import byte_tokenizer, tiny_model
from tests.support.watch import Watch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PARTS = [
    *(f"{method} {kind}" for method in ("residual", "edit", "slots") for kind in ("config", "files")),
    *("slots file", "covariance", "collection index", "LoRA config", "items"),
]
WHOLE = ["residual memory", "edit memory", "slots memory", "collection"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    torch.manual_seed(0)
    return Reader(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def saved(reader: Reader, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the reader's folders."""
    return lambda name: Path(shutil.copytree(reader.folder / name, tmp_path / name))


def hostile(examples: int) -> Callable[[Any], Any]:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=checks)


@pytest.mark.parametrize("name", PARTS)
def test_an_altered_file_is_valid_or_refused(reader: Reader, watch: Watch, name: str) -> None:
    @hostile(110)
    @given(st.randoms(), st.integers(0, 3))
    def run(choose: random.Random, which: int) -> None:
        files = reader.targets[name].files
        file = files[which % len(files)]
        with reader.altered(name, file, altered_file(file, reader.originals[name][file], choose)):
            reader.outcome(name, watch)

    run()


@pytest.mark.parametrize("name", WHOLE)
def test_an_altered_memory_changes_no_model(reader: Reader, watch: Watch, name: str) -> None:
    @hostile(12)
    @given(st.randoms(), st.integers(0, 3))
    def run(choose: random.Random, which: int) -> None:
        files = reader.targets[name].files
        file = files[which % len(files)]
        with reader.altered(name, file, altered_file(file, reader.originals[name][file], choose)):
            reader.outcome(name, watch)

    run()


def test_the_watch_sees_what_is_forbidden(watch: Watch, tmp_path: Path) -> None:
    def forbidden(act: Callable[[], object]) -> None:
        with pytest.raises(AssertionError, match="must not"), watch.over(tmp_path):
            act()

    torch.save(Evil(), tmp_path / "pickle")
    forbidden(lambda: torch.load(tmp_path / "pickle", weights_only=False))
    forbidden(lambda: eval("1 + 1"))
    forbidden(lambda: Path("/etc/hostname").read_bytes())
    forbidden(lambda: (tmp_path.parent / "outside").write_text(""))
    forbidden(lambda: int(Path("/etc/hostname").read_text() + "refused"))  # also if an error comes of it
    with pytest.raises(AssertionError, match="MiB"), watch.over(tmp_path):
        bytearray(b"\1" * (100 << 20))


@pytest.mark.parametrize(
    "text", ["[NaN]", "[1e999]", '{"a":1,"a":1}', '["\\ud800"]', "[" * 17 + "]" * 17, "[" * 99999, "1" * 9999]
)
def test_json_is_read_by_the_letter(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text)
    assert parse_json("[" * 16 + "]" * 16)


def test_sizes_are_checked_before_anything_is_allocated(watch: Watch, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.write((1 << 40).to_bytes(8, "little") + b"{")
        file.truncate(1 << 41)  # sparse: two tebibytes that take no space
    for read in (read_json, read_metadata):
        with pytest.raises(ValueError, match="at most"), watch.over(tmp_path):
            read(huge)
    huge.write_bytes((HEADER_BYTES + 1).to_bytes(8, "little") + bytes(HEADER_BYTES + 1))
    with pytest.raises(ValueError, match="at most 16,777,216"), watch.over(tmp_path):
        read_metadata(huge)
    with huge.open("wb") as file:
        file.truncate(JSON_BYTES + 1)
    with pytest.raises(ValueError, match="at most 67,108,864"), watch.over(tmp_path):
        read_json(huge)


def test_no_activation_imports_anything(watch: Watch, tmp_path: Path) -> None:
    made = []
    for name in ACT2FN:
        with watch.over(tmp_path), suppress(ValueError):
            made.append(MemoryAdapterConfig(activation=name).activation)
    assert {"prelu", "xielu"}.isdisjoint(made)
    assert {"gelu", "silu", "relu"} <= set(made)


def test_no_count_in_a_config_is_allocated(reader: Reader, watch: Watch) -> None:
    for method, counts in (
        ("edit", ("num_prefixes", "steps", "batch_tokens", "covariance_tokens", "prefix_length", "seed")),
        ("residual", ("memory_dim", "num_keys", "num_prefixes", "batch_size", "max_length", "min_steps", "seed")),
        ("slots", ("num_slots", "span_length", "lora_rank", "refine_steps", "encoder_steps", "seed")),
    ):
        name = f"{method} files"
        file = reader.targets[name].files[1]
        values = json.loads(reader.originals[name][file])
        for count in counts:
            for number in (1 << 31, 1 << 40, 1 << 53, 1 << 63):
                with reader.altered(name, file, json.dumps(values | {count: number}).encode()):
                    reader.outcome(name, watch)


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
    with pytest.raises(ValueError, match="of a repository on the Hub"):
        MemorySlots.load(slots, revision="v2")
    with pytest.raises(ValueError, match="of a repository on the Hub"):
        load_memory(tiny_model(), saved("residual memory"), revision="v2")


def test_items_of_any_length_take_linear_time(watch: Watch, tmp_path: Path) -> None:
    file = tmp_path / "items.json"
    file.write_text("[\n" + ",\n".join(['{"text": "a"}'] * 50_000) + ',\n{"text": 1}]')
    with pytest.raises(ValueError, match=r"line 50002"), watch.over(tmp_path, scale=4, size=file.stat().st_size):
        read_items(file)


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
