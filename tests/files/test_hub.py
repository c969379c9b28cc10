"""Pushing memories to a Hub and loading them, with the real client against a loopback loopback_hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from peft import PeftModel

from memory_adapters import Fact, MemitConfig, MemorySlotsConfig, inject_memory, load_memory, memories
from tests.support.hub import HubServer
from tests.support.hub_client import base_model, failed_load, loaded_hash, logits_hash, run_client, with_memory
from tests.support.models import byte_tokenizer

pytestmark = pytest.mark.integration

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def push() -> dict[str, Any]:
    first, second = with_memory(seed=0), with_memory(seed=1)
    return {
        "base": logits_hash(base_model()),
        "first": logits_hash(first.model),
        "first_url": first.push_to_hub("me/name"),
        "second": logits_hash(second.model),
        "second_url": second.push_to_hub("me/name", commit_message="Other knowledge"),
        "secret_url": first.push_to_hub("me/secret", private=True),
        "repeated_urls": [first.push_to_hub("me/repeated") for _ in range(4)],
        "branch_urls": [
            first.push_to_hub("me/repeated", commit_message="Again"),
            second.push_to_hub("me/repeated", revision="try/it", commit_message="On a branch"),
            second.push_to_hub("me/repeated", revision="try/it"),
        ],
    }


def load(repo_id: str, *revisions: str) -> list[str]:
    """Logits of fresh models with the memory at each revision; the default revision comes first and last."""
    return [loaded_hash(repo_id, revision) for revision in (None, *revisions, None)]


def tag_and_load(repo_id: str, sha: str) -> list[str]:
    api = HfApi()
    api.create_tag(repo_id, tag="v1", revision=sha)
    api.create_branch(repo_id, branch="older", revision=sha)
    assert api.model_info(repo_id, revision="v1").sha == sha
    return load(repo_id, sha, "v1", "older")


def method_there_and_back(method: str, repo_id: str) -> list[Any]:
    """Written, pushed and loaded again; then what only the method's own files make possible."""
    model, tokenizer = base_model(), byte_tokenizer()
    settings: dict[str, Any] = dict(layers=[1], steps=2, num_prefixes=1, prefix_length=2, covariance_tokens=200)
    slots = MemorySlotsConfig(read="all", num_slots=2, span_length=8, refine_steps=1)
    memory: Any = inject_memory(model, MemitConfig(**settings) if method == "edit" else slots, tokenizer=tokenizer)
    fact = Fact("{} is in", "The Eiffel Tower", "Rome")
    memory.write(fact, progress=False)
    spoken, base = logits_hash(model), logits_hash(base_model())
    memory.push_to_hub(repo_id, private=True)
    covariance = memory.covariance if method == "edit" else None
    memory.remove()
    back: Any = load_memory(model, repo_id, tokenizer=tokenizer)
    results = [logits_hash(model) == spoken, spoken != base]
    if covariance is not None:
        covariance.push_to_hub(f"{repo_id}-c0")
        back.forget(fact)
        results.append(logits_hash(model) == base)
        back.write(fact, covariance=f"{repo_id}-c0", progress=False)
        results.append(back.items == [fact])
        other = with_memory()
        other.push_to_hub(repo_id)
        results.append(loaded_hash(repo_id) == logits_hash(other.model))
    else:
        results.append(back.slots[0].num_tokens == len("The Eiffel Tower is in Rome."))
    return results


def load_with_peft(repo_id: str) -> list[str]:
    peft_model = PeftModel.from_pretrained(base_model(), repo_id)
    return [logits_hash(peft_model), *memories(peft_model)]


def load_what_is_refused(token: str) -> dict[str, Any]:
    refused = {name: failed_load(name) for name in ("me/secret", "me/nothing")}
    refused["no-such-branch"] = failed_load("me/name", "no-such-branch")
    return {"refused": refused, "with_token": loaded_hash("me/secret", token=token)}


@pytest.fixture(scope="module")
def pushed(loopback_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Addresses of the commits of two memories, and the logits with each."""
    return run_client(loopback_hub, tmp_path_factory.mktemp("home"), push)


@pytest.fixture(scope="module")
def loaded(loopback_hub: HubServer, pushed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Logits of loads from one cache: default, first sha, its tag, its branch, default; and what was downloaded."""
    home, before = tmp_path_factory.mktemp("home"), len(loopback_hub.downloads)
    logits = run_client(loopback_hub, home, tag_and_load, "me/name", sha_of(pushed["first_url"]))
    return {"home": home, "logits": logits, "downloads": loopback_hub.downloads[before:]}


def sha_of(url: str) -> str:
    return url.rpartition("/")[2]


def test_push_makes_one_commit_of_three_files(loopback_hub: HubServer, pushed: dict[str, Any]) -> None:
    repo = loopback_hub.repos["me/name"]
    created, first, second = repo.commits
    assert pushed["first_url"] == f"{loopback_hub.url}/me/name/commit/{first}"
    assert pushed["second_url"] == f"{loopback_hub.url}/me/name/commit/{second}"
    assert sorted(set(repo.commits[first]) - set(repo.commits[created])) == FILES
    assert not repo.private
    assert loopback_hub.repos["me/secret"].private


def test_pushing_the_same_memory_again_makes_no_commit(pushed: dict[str, Any]) -> None:
    assert len(set(pushed["repeated_urls"])) == 1


def test_a_branch_is_made_and_pushed_to(loopback_hub: HubServer, pushed: dict[str, Any]) -> None:
    repo = loopback_hub.repos["me/repeated"]
    main, branch, branch_again = map(sha_of, pushed["branch_urls"])
    assert branch == branch_again
    assert repo.branches == {"main": main, "try/it": branch}
    assert list(repo.messages.values())[1:] == ["Upload ResidualMemory", "On a branch"]
    files, others = repo.commits[branch], loopback_hub.repos["me/name"].commits[sha_of(pushed["second_url"])]
    assert files[FILES[2]] == others[FILES[2]] != repo.commits[main][FILES[2]]
    assert b'load_memory(model, "me/repeated", tokenizer=tokenizer)' in repo.commits[main][FILES[0]]
    assert b'load_memory(model, "me/repeated", revision="try/it", tokenizer=tokenizer)' in files[FILES[0]]


def test_pushed_card_is_ours(loopback_hub: HubServer, pushed: dict[str, Any]) -> None:
    card = loopback_hub.repos["me/name"].commits[sha_of(pushed["second_url"])]["README.md"].decode()
    assert "from memory_adapters import load_memory" in card
    assert "library_name: peft" in card
    assert "library_name: transformers" not in card


def test_load_and_revision_are_bit_identical(pushed: dict[str, Any], loaded: dict[str, Any]) -> None:
    assert len({pushed["base"], pushed["first"], pushed["second"]}) == 3
    default, sha, tag, branch, default_again = loaded["logits"]
    assert default == default_again == pushed["second"]
    assert sha == tag == branch == pushed["first"]


def test_nothing_is_downloaded_twice(loaded: dict[str, Any]) -> None:
    assert set(loaded["downloads"]) == set(FILES)
    assert loaded["downloads"].count("adapter_model.safetensors") == 2, "of five loads of two commits"


def test_offline_loads_from_the_cache(loopback_hub: HubServer, pushed: dict[str, Any], loaded: dict[str, Any]) -> None:
    before = len(loopback_hub.requests)
    hashes = run_client(loopback_hub, loaded["home"], load, "me/name", "v1", HF_HUB_OFFLINE="1")
    assert hashes == [pushed["second"], pushed["first"], pushed["second"]]
    assert len(loopback_hub.requests) == before


def test_refused_loads_say_why_and_leave_the_model_alone(
    loopback_hub: HubServer, pushed: dict[str, Any], tmp_path: Path
) -> None:
    result = run_client(loopback_hub, tmp_path, load_what_is_refused, loopback_hub.token, HF_TOKEN="")
    for name, failed in result["refused"].items():
        assert failed["unchanged"], name
        assert name in failed["message"]
    private, unknown, branch = result["refused"].values()
    assert private["error"] == unknown["error"] == "RepositoryNotFoundError"
    assert "make sure you are authenticated" in private["message"]
    assert branch["error"] == "RevisionNotFoundError"
    assert result["with_token"] == pushed["first"]


def test_plain_peft_loads_it(loopback_hub: HubServer, pushed: dict[str, Any], tmp_path: Path) -> None:
    assert run_client(loopback_hub, tmp_path, load_with_peft, "me/name") == [pushed["second"], "default"]


def test_other_files_are_not_downloaded(loopback_hub: HubServer, pushed: dict[str, Any], tmp_path: Path) -> None:
    repo = loopback_hub.repos["me/name"]
    extra = dict.fromkeys(["evil.pkl", "pytorch_model.bin", "adapter_model.bin", "modeling.py"], b"not downloaded")
    repo.commit({**repo.commits[sha_of(pushed["first_url"])], **extra}, branch="with-extra-files")
    before = len(loopback_hub.downloads)
    hashes = run_client(loopback_hub, tmp_path, load, "me/name", "with-extra-files")
    assert hashes == [pushed["second"], pushed["first"], pushed["second"]]
    assert set(loopback_hub.downloads[before:]) == set(FILES)
    cached = {path.name for path in (tmp_path / "hub").rglob("*") if path.is_file()}
    assert set(FILES) <= cached
    assert not cached & set(extra)


@pytest.mark.parametrize("method", ["edit", "slots"])
def test_every_methods_files_travel(loopback_hub: HubServer, tmp_path: Path, method: str) -> None:
    assert all(run_client(loopback_hub, tmp_path, method_there_and_back, method, f"me/{method}"))
    assert loopback_hub.repos[f"me/{method}"].private
