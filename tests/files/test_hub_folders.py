"""Subfolders, and all adapters of a model, from a Hub: only what is needed is downloaded, and only what is inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from peft import LoraConfig

from memory_adapters import MemoryAdapterConfig, inject_memory, load_adapters, memories, save_adapters
from memory_adapters.files.hub import find_file, find_files
from tests.support.hub import HubServer
from tests.support.hub.repos import Repo
from tests.support.hub_client import base_model, logits_hash, run_client

MEMORY = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
LORA = MEMORY[1:]


def with_adapters(seed: int = 0) -> Any:
    """A model with a memory called `facts`, and a LoRA called `style [v1]`."""
    model: Any = base_model()
    settings: dict[str, Any] = dict(token_gate="none", gate_init=0.5, seed=seed)
    inject_memory(model, MemoryAdapterConfig(**settings), adapter_name="facts")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "style [v1]")
    model.eval()
    memories(model)["facts"].active = True
    return model


def publish(server: HubServer, repo_id: str, folder: Path, prefix: str = "", **extra: bytes) -> str:
    """Commit the files of a folder; returns the commit."""
    files = {f"{prefix}{p.relative_to(folder).as_posix()}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return server.repos.setdefault(repo_id, Repo()).commit({**files, **extra})


def load(repo_id: str, *options: str) -> dict[str, Any]:
    """Load all adapters with these options (`name=value`); the logits, the memories, and the error if there is one."""
    model = base_model()
    given: dict[str, Any] = dict(option.split("=", 1) for option in options)
    try:
        found = load_adapters(model, repo_id, **given | {"local_files_only": given.get("local_files_only") == "yes"})
    except (OSError, ValueError) as error:
        assert not getattr(model, "peft_config", {})
        return {"error": type(error).__name__, "message": str(error)}
    return {"logits": logits_hash(model), "memories": list(found)}


def load_all(sha: str, cache: str) -> list[dict[str, Any]]:
    return [
        load("me/all", f"revision={sha}"),
        load("me/all", "local_files_only=yes"),
        load("me/all"),
        load("me/all", "local_files_only=yes"),
        load("me/all", "subfolder=runs/last"),
        load("me/all", f"cache_dir={cache}", "local_files_only=yes"),
        load("me/all", f"cache_dir={cache}"),
        load("me/all", f"cache_dir={cache}", "local_files_only=yes"),
        load("me/all", "subfolder=runs"),
        load("me/all", "subfolder=nowhere"),
        load("me/all", "subfolder=runs/../runs/last"),
    ]


def find_subfolder() -> dict[str, Any]:
    folder = find_files("me/all", revision=None, token=None, subfolder="runs/last/facts")
    file = find_file("me/all", "adapter_config.json", revision=None, token=None, subfolder="runs/last/facts")
    return {"names": sorted(path.name for path in folder.iterdir()), "file": str(file.relative_to(folder))}


@pytest.fixture(scope="module")
def shas(loopback_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two commits of `me/all`: adapters at the root, others there and in `runs/last`, and checkpoints beside them."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    save_adapters(with_adapters(0), first)
    save_adapters(with_adapters(1), second)
    shas = [publish(loopback_hub, "me/all", first), publish(loopback_hub, "me/all", second)]
    publish(loopback_hub, "me/all", first, "runs/last/")
    return [shas[0], publish(loopback_hub, "me/all", first, "checkpoint-1/")]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_all_adapters_are_loaded_from_a_hub(loopback_hub: HubServer, shas: list[str], tmp_path: Path) -> None:
    before = len(loopback_hub.requests)
    cache = str(tmp_path / "cache")
    first, old, second, again, inner, empty, other, kept, *refused = run_client(
        loopback_hub, tmp_path / "home", load_all, shas[0], cache
    )
    expected = [logits_hash(with_adapters(seed)) for seed in (0, 1)]
    assert expected[0] != expected[1]
    assert first == inner == {"logits": expected[0], "memories": ["facts"]}
    assert second == again == other == kept == {"logits": expected[1], "memories": ["facts"]}
    assert old["error"] == empty["error"] == "LocalEntryNotFoundError", "only another commit, and nothing"
    no_index, nowhere, outside = refused
    assert no_index["message"].endswith("has no adapters.json: give a folder written by `save_adapters`.")
    assert nowhere["message"].startswith("`me/all` has no folder `nowhere`.")
    assert "`subfolder='runs/../runs/last'` must be the path of a folder inside the one given" in outside["message"]
    resolved = [unquote(path) for _, path in loopback_hub.requests[before:] if "/resolve/" in path]
    assert not any("checkpoint" in path for path in resolved)
    assert {path.partition("/runs/last/")[2] for path in resolved if "/runs/" in path} == {
        "adapters.json",
        *(f"facts/{name}" for name in MEMORY),
        *(f"style [v1]/{name}" for name in LORA),
    }


def test_only_the_files_of_a_subfolder_are_downloaded(loopback_hub: HubServer, shas: list[str], tmp_path: Path) -> None:
    before = len(loopback_hub.downloads)
    found = run_client(loopback_hub, tmp_path / "home", find_subfolder)
    assert found["names"] == MEMORY
    assert found["file"] == "adapter_config.json"
    assert sorted(loopback_hub.downloads[before:]) == MEMORY


def test_an_index_from_a_hub_is_not_trusted(loopback_hub: HubServer, tmp_path: Path) -> None:
    index = b'{"adapters": [{"name": "../x", "memory": true, "active": true}]}'
    loopback_hub.repos["me/hostile"] = Repo()
    loopback_hub.repos["me/hostile"].commit({"adapters.json": index, "x/adapter_config.json": b"{}"})
    found = run_client(loopback_hub, tmp_path / "home", load, "me/hostile")
    assert found["error"] == "ValueError"
    assert "names must be those of single folders" in found["message"]


@pytest.mark.parametrize("subfolder", ["", ".", "..", "/x", "a/../../x", "a//b", "a\\..\\x", "C:/x", "a\n"])
def test_a_subfolder_is_inside(subfolder: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="must be the path of a folder inside the one given"):
        find_files(tmp_path / "a", revision=None, token=None, subfolder=subfolder)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_subfolders_of_a_local_folder(tmp_path: Path) -> None:
    model = with_adapters()
    save_adapters(model, tmp_path / "runs" / "last")
    other = base_model()
    load_adapters(other, tmp_path, subfolder="runs/last/")
    assert logits_hash(other) == logits_hash(model)
    options: dict[str, Any] = dict(revision=None, token=None)
    facts = tmp_path / "runs" / "last" / "facts"
    assert find_files(tmp_path, subfolder="runs/last/facts", **options) == facts
    assert find_file(tmp_path, MEMORY[1], subfolder="runs/last/facts", **options) == facts / MEMORY[1]
    with pytest.raises(FileNotFoundError, match="has no folder `runs/first`"):
        find_files(tmp_path, subfolder="runs/first", **options)
    with pytest.raises(FileNotFoundError, match=r"has no runs/last/x\.json"):
        find_file(tmp_path, "x.json", subfolder="runs/last", **options)
    with pytest.raises(ValueError, match=r"is a file: give its folder"):
        find_file(facts / MEMORY[1], MEMORY[1], subfolder="facts", **options)
    (tmp_path / "runs" / "link").symlink_to(tmp_path.parent)
    with pytest.raises(ValueError, match="is a link out of its folder"):
        find_files(tmp_path, subfolder="runs/link", **options)
    with pytest.raises(ValueError, match="`revision='v1'` is for a repository on the Hub"):
        load_adapters(base_model(), tmp_path, subfolder="runs/last", revision="v1")
