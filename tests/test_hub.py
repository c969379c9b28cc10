"""Pushing to and loading from a Hub, with the real client against a loopback server.

The client reads its settings when it is imported, so what it does runs in a fresh Python: `run_client` starts this
file with the name of one of the functions marked `@client` below.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from memory_adapters import (
    Fact,
    MemitConfig,
    Memory,
    MemoryAdapterConfig,
    MemorySlotsConfig,
    inject_memory,
    load_memory,
    memories,
)
from tests.hub_server import HubServer
from tests.models import byte_tokenizer

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_")  # settings of whoever runs the tests
THEIR_WARNINGS = [  # huggingface_hub's own upload of large files; PEFT's own look at the model
    *("-W", "ignore:Use 'content=:DeprecationWarning"),
    *("-W", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
CLIENT: dict[str, Callable[..., Any]] = {}


def run_client(server: HubServer, home: Path, function: str, *args: str, **env: str) -> Any:
    """Run a client function in a fresh Python that is logged in to `server` and caches in `home`."""
    settings = dict(HF_ENDPOINT=server.url, HF_HOME=str(home), HF_TOKEN=server.token, HF_HUB_OFFLINE="0")
    settings |= dict(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1", OMP_NUM_THREADS="1")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    done = subprocess.run(
        [sys.executable, "-W", "error", *THEIR_WARNINGS, "-m", "tests.test_hub", function, *args],
        cwd=Path(__file__).parents[1],
        env={**inherited, **settings, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def client(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let `run_client` run a function; its arguments are strings, its result is sent back as JSON."""
    CLIENT[function.__name__] = function
    return function


def base_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def with_memory(seed: int = 0) -> Memory:
    """A memory whose seeded weights take part in every token."""
    return inject_memory(base_model(), MemoryAdapterConfig(token_gate="none", gate_init=0.5, seed=seed))


@torch.no_grad()
def logits_hash(model: torch.nn.Module) -> str:
    return hashlib.sha256(model(torch.arange(0, 300, 11)[None]).logits.numpy().tobytes()).hexdigest()


def traces(model: PreTrainedModel) -> list[Any]:
    """What a load that fails must leave as it was."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [logits_hash(model), list(model.state_dict()), trainable, sorted(vars(model)), hooks, len(memories(model))]


def failed_load(repo_id: str, revision: str | None = None) -> dict[str, Any]:
    model = base_model()
    before = traces(model)
    try:
        load_memory(model, repo_id, revision=revision)
    except OSError as error:
        return {"error": type(error).__name__, "message": str(error), "unchanged": traces(model) == before}
    raise AssertionError(f"{repo_id} was loaded")


@client
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
    }


@client
def load(repo_id: str, *revisions: str) -> list[str]:
    """Logits of fresh models with the memory at each revision; the default revision comes first and last."""
    hashes = []
    for revision in (None, *revisions, None):
        memory = load_memory(base_model(), repo_id, revision=revision)
        hashes.append(logits_hash(memory.model))
    return hashes


@client
def tag_and_load(repo_id: str, sha: str) -> list[str]:
    api = HfApi()
    api.create_tag(repo_id, tag="v1", revision=sha)
    api.create_branch(repo_id, branch="older", revision=sha)
    assert api.model_info(repo_id, revision="v1").sha == sha
    return load(repo_id, sha, "v1", "older")


@client
def method_there_and_back(method: str, repo_id: str) -> list[Any]:
    """Written, pushed and loaded again; then what only the method's own files make possible."""
    model, tokenizer = base_model(), byte_tokenizer()
    settings: dict[str, Any] = dict(layers=[1], steps=2, num_prefixes=1, prefix_length=2, covariance_tokens=200)
    slots = MemorySlotsConfig(num_slots=2, span_length=8, refine_steps=1)
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
        results.append(back.facts == [fact])
    else:
        results.append(back.slots[0].num_tokens == len("The Eiffel Tower is in Rome."))
    return results


@client
def load_with_peft(repo_id: str) -> list[str]:
    peft_model = PeftModel.from_pretrained(base_model(), repo_id)
    return [logits_hash(peft_model), *memories(peft_model)]


@client
def load_what_is_refused(token: str) -> dict[str, Any]:
    refused = {name: failed_load(name) for name in ("me/secret", "me/nothing")}
    refused["no-such-branch"] = failed_load("me/name", "no-such-branch")
    return {"refused": refused, "with_token": logits_hash(load_memory(base_model(), "me/secret", token=token).model)}


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Addresses of the commits of two memories, and the logits with each."""
    return run_client(server, tmp_path_factory.mktemp("home"), "push")


@pytest.fixture(scope="module")
def loaded(server: HubServer, pushed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Logits of loads from one cache: default, first sha, its tag, its branch, default; and what was downloaded."""
    home, before = tmp_path_factory.mktemp("home"), len(server.downloads)
    logits = run_client(server, home, "tag_and_load", "me/name", sha_of(pushed["first_url"]))
    return {"home": home, "logits": logits, "downloads": server.downloads[before:]}


def sha_of(url: str) -> str:
    return url.rpartition("/")[2]


def test_push_makes_one_commit_of_three_files(server: HubServer, pushed: dict[str, Any]) -> None:
    repo = server.repos["me/name"]
    created, first, second = repo.commits
    assert pushed["first_url"] == f"{server.url}/me/name/commit/{first}"
    assert pushed["second_url"] == f"{server.url}/me/name/commit/{second}"
    assert sorted(set(repo.commits[first]) - set(repo.commits[created])) == FILES
    assert not repo.private
    assert server.repos["me/secret"].private


def test_pushing_the_same_memory_again_makes_no_commit(pushed: dict[str, Any]) -> None:
    assert len(set(pushed["repeated_urls"])) == 1


def test_pushed_card_is_ours(server: HubServer, pushed: dict[str, Any]) -> None:
    card = server.repos["me/name"].commits[sha_of(pushed["second_url"])]["README.md"].decode()
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


def test_offline_loads_from_the_cache(server: HubServer, pushed: dict[str, Any], loaded: dict[str, Any]) -> None:
    before = len(server.requests)
    hashes = run_client(server, loaded["home"], "load", "me/name", "v1", HF_HUB_OFFLINE="1")
    assert hashes == [pushed["second"], pushed["first"], pushed["second"]]
    assert len(server.requests) == before


def test_refused_loads_say_why_and_leave_the_model_alone(
    server: HubServer, pushed: dict[str, Any], tmp_path: Path
) -> None:
    result = run_client(server, tmp_path, "load_what_is_refused", server.token, HF_TOKEN="")
    for name, failed in result["refused"].items():
        assert failed["unchanged"], name
        assert name in failed["message"]
    private, unknown, branch = result["refused"].values()
    assert private["error"] == unknown["error"] == "RepositoryNotFoundError"
    assert "make sure you are authenticated" in private["message"]
    assert branch["error"] == "RevisionNotFoundError"
    assert result["with_token"] == pushed["first"]


def test_plain_peft_loads_it(server: HubServer, pushed: dict[str, Any], tmp_path: Path) -> None:
    assert run_client(server, tmp_path, "load_with_peft", "me/name") == [pushed["second"], "default"]


def test_other_files_are_not_downloaded(server: HubServer, pushed: dict[str, Any], tmp_path: Path) -> None:
    repo = server.repos["me/name"]
    extra = dict.fromkeys(["evil.pkl", "pytorch_model.bin", "adapter_model.bin", "modeling.py"], b"not downloaded")
    repo.commit({**repo.commits[sha_of(pushed["first_url"])], **extra}, branch="with-extra-files")
    before = len(server.downloads)
    hashes = run_client(server, tmp_path, "load", "me/name", "with-extra-files")
    assert hashes == [pushed["second"], pushed["first"], pushed["second"]]
    assert set(server.downloads[before:]) == set(FILES)
    cached = {path.name for path in (tmp_path / "hub").rglob("*") if path.is_file()}
    assert set(FILES) <= cached
    assert not cached & set(extra)


@pytest.mark.parametrize("method", ["edit", "slots"])
def test_every_methods_files_travel(server: HubServer, tmp_path: Path, method: str) -> None:
    assert all(run_client(server, tmp_path, "method_there_and_back", method, f"me/{method}"))
    assert server.repos[f"me/{method}"].private


def only_loopback(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook that refuses every other network."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[0] if event == "socket.getaddrinfo" else arguments[1][0]
        if host != "127.0.0.1":
            raise RuntimeError(f"A client of the loopback Hub wanted to reach {host!r}.")


if __name__ == "__main__":
    sys.addaudithook(only_loopback)
    print(json.dumps(CLIENT[sys.argv[1]](*sys.argv[2:])))
