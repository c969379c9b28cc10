"""Covariances and slots on a Hub, as memories: private, at a revision, offline, beside a memory; and their cards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from memory_adapters import Covariance, MemorySlots, load_memory
from tests.support.hub import HubServer
from tests.support.hub.repos import Repo
from tests.support.hub_client import base_model, run_client, with_memory

KINDS: dict[str, Any] = {"covariance": Covariance, "slots": MemorySlots}
BASE = {"model_type": "llama", "hidden_size": 32, "num_layers": 3}


def made(kind: str, seed: int) -> Any:
    numbers = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
    if kind == "covariance":
        return Covariance({1: numbers @ numbers.T}, 1234, 3, "rhymes | *songs*", BASE)
    return MemorySlots(numbers, (5, 3), 24, BASE, None, "0" * 64)


def digest(found: Any) -> str:
    numbers = found.vectors if isinstance(found, MemorySlots) else found.matrices[1]
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()


def push() -> dict[str, Any]:
    urls: dict[str, Any] = {}
    for kind in KINDS:
        urls[kind] = [
            made(kind, 0).push_to_hub(f"me/{kind}", commit_message="First"),
            made(kind, 1).push_to_hub(f"me/{kind}"),
            made(kind, 1).push_to_hub(f"me/{kind}"),
            made(kind, 2).push_to_hub(f"me/{kind}", revision="other", commit_message="On a branch"),
        ]
        HfApi().create_tag(f"me/{kind}", tag="v1", revision=sha_of(urls[kind][0]))
        made(kind, 0).push_to_hub(f"me/secret-{kind}", private=True)
    memory = with_memory()
    memory.push_to_hub("me/both")
    made("covariance", 0).push_to_hub("me/both")
    urls["both"] = memory.push_to_hub("me/both")
    return urls


def load(*shas: str) -> dict[str, list[str]]:
    """Both kinds at the default revision, a commit, a tag and a branch."""
    return {
        kind: [digest(KINDS[kind].load(f"me/{kind}", revision=r)) for r in (None, sha, "v1", "other")]
        for kind, sha in zip(KINDS, shas, strict=True)
    }


def error_of(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except OSError as error:
        return [type(error).__name__, str(error)]
    raise AssertionError("it was loaded")


def push_and_load() -> dict[str, Any]:
    """Push, and then load without being logged in."""
    urls = push()
    token = os.environ.pop("HF_TOKEN")
    errors, secrets = {}, []
    for kind, cls in KINDS.items():
        errors[kind] = [
            error_of(lambda: cls.load(f"me/secret-{kind}")),  # noqa: B023
            error_of(lambda: cls.load(f"me/{kind}", revision="no-such-branch")),  # noqa: B023
            error_of(lambda: cls.load("me/neither")),  # noqa: B023
        ]
        secrets.append(digest(cls.load(f"me/secret-{kind}", token=token)))
    load_memory(base_model(), "me/both")
    both = digest(Covariance.load("me/both"))
    loaded = load(*(sha_of(urls[kind][0]) for kind in KINDS))
    return {"urls": urls, "loaded": loaded, "secrets": secrets, "errors": errors, "both": both}


def load_offline(*shas: str) -> dict[str, Any]:
    return {"loaded": load(*shas), "errors": [error_of(lambda: MemorySlots.load("me/neither"))]}


def sha_of(url: str) -> str:
    return url.rpartition("/")[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def found(loopback_hub: HubServer, home: Path) -> dict[str, Any]:
    """What was pushed, and what was then loaded into the cache in `home`."""
    loopback_hub.repos["me/neither"] = Repo()
    loopback_hub.repos["me/neither"].commit({"README.md": b"Nothing"})
    return run_client(loopback_hub, home, push_and_load)


@pytest.mark.parametrize("kind", KINDS)
def test_pushing_makes_one_commit_of_the_file_and_a_card(
    loopback_hub: HubServer, found: dict[str, Any], kind: str
) -> None:
    repo, file = loopback_hub.repos[f"me/{kind}"], KINDS[kind].file
    first, second, again, branch = map(sha_of, found["urls"][kind])
    assert second == again
    assert list(repo.commits)[1:] == [first, second, branch]
    assert [repo.messages[sha] for sha in (first, second, branch)] == [
        "First",
        f"Upload {KINDS[kind].__name__}",
        "On a branch",
    ]
    assert repo.branches == {"main": second, "other": branch}
    assert sorted(repo.commits[first]) == [".gitattributes", "README.md", file]
    assert loopback_hub.repos[f"me/secret-{kind}"].private
    card = ModelCard(repo.commits[branch]["README.md"].decode())
    assert card.data.to_dict()["tags"] == ["memory-adapters", "memory-slots" if kind == "slots" else "covariance"]
    assert f'{KINDS[kind].__name__}.load("me/{kind}", revision="other")' in card.text
    assert "| hidden size | 32 |" in card.text
    expected = "| tokens of the text | 24 |" if kind == "slots" else r"| source | rhymes \| \*songs\* |"
    assert expected in card.text


def test_beside_a_memory_the_card_is_the_memorys(loopback_hub: HubServer, found: dict[str, Any]) -> None:
    files = loopback_hub.repos["me/both"].commits[sha_of(found["urls"]["both"])]
    assert b"load_memory" in files["README.md"]
    assert {"adapter_model.safetensors", Covariance.file} <= set(files)


def test_private_and_at_a_revision(found: dict[str, Any]) -> None:
    for kind in KINDS:
        first, second, third = (digest(made(kind, seed)) for seed in range(3))
        assert found["loaded"][kind] == [second, first, first, third]
        private, branch, nothing = found["errors"][kind]
        assert private[0] == "RepositoryNotFoundError"
        assert "make sure you are authenticated" in private[1]
        assert branch[0] == "RevisionNotFoundError"
        assert nothing == ["FileNotFoundError", f"`me/neither` has no {KINDS[kind].file}."]
    assert found["secrets"] == [digest(made(kind, 0)) for kind in KINDS]
    assert found["both"] == digest(made("covariance", 0))


def test_offline_loads_from_the_cache(loopback_hub: HubServer, found: dict[str, Any], home: Path) -> None:
    shas = [sha_of(found["urls"][kind][0]) for kind in KINDS]
    before = len(loopback_hub.requests)
    offline = run_client(loopback_hub, home, load_offline, *shas, HF_HUB_OFFLINE="1")
    assert offline["loaded"] == found["loaded"]
    (error,) = offline["errors"]
    assert error[0] in ("FileNotFoundError", "LocalEntryNotFoundError")
    assert len(loopback_hub.requests) == before


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_folders_are_never_looked_for_on_the_hub(kind: str, tmp_path: Path) -> None:
    cls, one = KINDS[kind], made(kind, 0)
    one.save(tmp_path / cls.file)
    assert digest(cls.load(tmp_path / cls.file)) == digest(cls.load(tmp_path)) == digest(one)
    for missing in ("folder/name.safetensors", tmp_path / "name.safetensors"):
        with pytest.raises(FileNotFoundError, match="does not exist: give a saved file, or a repository"):
            cls.load(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"empty` has no {cls.file}"):
        cls.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="is not a folder with"):
        cls.load("./nowhere")
