"""Folders, indices and repositories that want a reader to leave them, and settings that want PEFT to do more."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import load_adapters, load_memory, memories
from memory_adapters.files.atomic import finish_interrupted_save
from tests.support.hostile import Evil, Reader
from tests.support.hub import HubServer
from tests.support.hub.repos import Repo
from tests.support.hub_client import base_model, run_client, with_memory
from tests.support.models import tiny_model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    torch.manual_seed(0)
    return Reader(tmp_path_factory.mktemp("files"))


@pytest.fixture
def saved(reader: Reader, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the reader's folders."""
    return lambda name: Path(shutil.copytree(reader.folder / name, tmp_path / name))


@pytest.mark.parametrize("target", ["outside", "inside", "cache"])
def test_links_out_of_the_folder_are_not_followed(saved: Callable[[str], Path], tmp_path: Path, target: str) -> None:
    folder, model = saved("residual memory"), tiny_model()
    if target == "cache":  # as huggingface_hub lays it out
        place = tmp_path / "models--me--x" / "snapshots" / "0123"
        place.parent.mkdir(parents=True)
        folder = folder.rename(place)
        (tmp_path / "models--me--x" / "blobs").mkdir()
    other = {"outside": tmp_path / "w", "inside": folder / "w", "cache": tmp_path / "models--me--x" / "blobs" / "w"}[
        target
    ]
    (folder / WEIGHTS).rename(other)
    (folder / WEIGHTS).symlink_to(other)
    if target == "outside":
        with pytest.raises(ValueError, match=r"is a link to .*outside of its folder"):
            load_memory(model, folder)
        assert not memories(model)
    else:
        load_memory(model, folder)


def test_an_unfinished_save_that_is_none_moves_nothing_through_links(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    (folder / ".memory-adapters-committed" / "sub").mkdir(parents=True)
    (folder / ".memory-adapters-committed" / "sub" / "planted").write_text("")
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("")
    (folder / "sub").symlink_to(elsewhere)
    (folder / ".memory-adapters-staging-x").symlink_to(elsewhere)
    with pytest.raises(OSError, match="link"):
        finish_interrupted_save(folder)
    (folder / "other").mkdir()
    (folder / "other" / ".memory-adapters-committed").symlink_to(elsewhere)
    finish_interrupted_save(folder / "other")
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/", "/etc", "../style", "style/..", "style/", "a/b", "\0", "a\n", "a" * 256, 3, None, ["a"]],
)
def test_names_in_an_index_are_single_folders(saved: Callable[[str], Path], name: Any) -> None:
    folder, model = saved("collection"), tiny_model()
    index = {"adapters": [{"name": name, "memory": True, "active": True}]}
    (folder / "adapters.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is damaged"):
        load_adapters(model, folder)
    assert not memories(model)


def test_an_index_of_links_and_repetitions(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder, model = saved("collection"), tiny_model()
    (folder / "style").rename(tmp_path / "style")
    (folder / "style").symlink_to(tmp_path / "style")
    with pytest.raises(ValueError, match="leads out of its folder"):
        load_adapters(model, folder)
    entry = {"name": "facts", "memory": True, "active": True}
    (folder / "adapters.json").write_text(json.dumps({"adapters": [entry, entry]}))
    with pytest.raises(ValueError, match="each once"):
        load_adapters(model, folder)
    assert not memories(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"megatron_config": {}, "megatron_core": "antigravity"}, "`megatron_c.*` may make PEFT import, open or build"),
        ({"layer_replication": [[0, 1000000]]}, "adds layers to the base model"),
        ({"loftq_config": {"loftq_bits": 4}}, "may make PEFT import, open or build"),
        ({"corda_config": {"cache_file": "/etc/passwd"}}, "may make PEFT import, open or build"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the weights of the base model"),
        ({"target_modules": r"(\w+\.?)+X"}, "very long to search"),
        ({"target_modules": r"\w*\w*\w*\w*\w*X"}, "very long to search"),
        ({"modules_to_save": [r"(\w+\.?)+X"]}, "very long to search"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"target_modules": ["nowhere"]}, "does not fit this model"),
        ({"target_modules": [3]}, "list of module names"),
        ({"rank_pattern": {"(a+)+": 4}}, "very long to search"),
        ({"rank_pattern": {"q_proj": 1 << 50}}, "describes floats of shape"),
        ({"rank_pattern": {"q_proj": "big"}}, "`rank_pattern` must be"),
        ({"r": 1 << 50}, "describes floats of shape"),
        ({"r": 1 << 62}, "does not fit this model"),
        ({"r": 0}, "cannot be used|does not fit this model"),
        ({"lora_alpha": "\\x"}, "may make PEFT import, open or build"),
        ({"use_dora": True}, "missing"),
        ({"target_parameters": ["mlp.down_proj.weight"]}, "missing"),
        ({"trainable_token_indices": [1 << 60]}, "`trainable_token_indices` must be"),
        ({"task_type": "WORLD_PEACE"}, "Invalid task type"),
        ({"a_field_of_2030": 1}, "update PEFT"),
        ({"peft_type": "PROMPT_TUNING"}, "update PEFT|does not fit|cannot be used"),
        ({"peft_type": "MEMIT"}, "not one of PEFT's"),
        ({"peft_type": ["LORA"]}, "not one of PEFT's"),
    ],
)
def test_settings_that_make_peft_do_more_than_hold_matrices(
    saved: Callable[[str], Path], fields: dict[str, Any], message: str
) -> None:
    folder, model = saved("collection"), tiny_model()
    config = folder / "style" / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    load_adapters(tiny_model(), saved("collection index"))
    with pytest.raises(ValueError, match=message):
        load_adapters(model, folder)
    assert not getattr(model, "peft_config", {})
    assert "antigravity" not in sys.modules


def test_settings_of_peft_that_only_describe_matrices(saved: Callable[[str], Path]) -> None:
    folder = saved("collection")
    config = folder / "style" / CONFIG
    fields = {
        "target_modules": r".*\.(q_proj|v_proj)",
        "auto_mapping": {"parent_library": "antigravity"},
        "use_rslora": True,
    }
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    model: Any = tiny_model()
    load_adapters(model, folder)
    assert model.model.layers[0].self_attn.q_proj.scaling["style"] == pytest.approx(8 / 2**0.5)


def test_pickles_are_not_read(saved: Callable[[str], Path]) -> None:
    folder, model = saved("collection"), tiny_model()
    torch.save(Evil(), folder / "style" / "adapter_model.bin")
    (folder / "style" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        load_adapters(model, folder)
    assert not memories(model)
    torch.save(Evil(), folder / "style" / WEIGHTS)
    with pytest.raises(ValueError, match="is damaged"):
        load_adapters(model, folder)


HOSTILE_NAMES = [
    *(
        "../../planted",
        "/planted",
        "..",
        "a/../../planted",
        "adapter_config.json/../../planted",
        "C:\\planted",
        "~/planted",
    ),
    *("adapter_model.bin", "modeling.py", "../adapter_config.json", "x/adapter_config.json", "ledger.safetensors/x"),
]


def load_a_hostile_repository() -> dict[str, Any]:

    home = Path(os.environ["HF_HOME"])
    model: Any = base_model()
    load_memory(model, "me/hostile")
    found = [path for path in home.parent.rglob("*") if path.is_file() or path.is_symlink()]
    return {"names": sorted({p.name for p in found}), "outside": [str(p) for p in found if home not in p.parents]}


def test_names_of_a_repository_are_not_trusted(loopback_hub: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "deep" / "home"
    home.mkdir(parents=True)
    with_memory().save_pretrained(tmp_path / "memory")
    good = {path.name: path.read_bytes() for path in (tmp_path / "memory").iterdir()}
    loopback_hub.repos["me/hostile"] = Repo()
    loopback_hub.repos["me/hostile"].commit({**good, **dict.fromkeys(HOSTILE_NAMES, b"planted")})
    found = run_client(loopback_hub, home, load_a_hostile_repository)
    assert not found["outside"]
    assert not {"planted", "adapter_model.bin", "modeling.py"} & set(found["names"])
    assert not any(
        "planted" in path or path.endswith((".bin", ".py")) for _, path in loopback_hub.requests if "/resolve/" in path
    )
