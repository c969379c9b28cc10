"""Interrupted uploads and downloads: what was there stays whole, and the next try succeeds.

huggingface_hub itself tries six times, and waits between: one break heals by itself, six are an error. Before version 2
it gives up at the first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError

from memory_adapters import MemorySlots
from memory_adapters.files.hub import _connected
from tests.files.test_hub_files import digest, made
from tests.support.hub import HubServer
from tests.support.hub.faults import Fault
from tests.support.hub.repos import Repo
from tests.support.hub_client import failed_load, loaded_hash, logits_hash, run_client, start_client, with_memory

ATTEMPTS = 6 if int(huggingface_hub.__version__.partition(".")[0]) >= 2 else 1
WEIGHTS = "adapter_model.safetensors"


def publish(server: HubServer, repo_id: str, *seeds: int, folder: Path) -> list[str]:
    """A repository with a commit for the memory of each seed; their shas."""
    repo = server.repos[repo_id] = Repo()
    shas = []
    for seed in seeds:
        with_memory(seed).save_pretrained(folder)
        shas.append(repo.commit({file.name: file.read_bytes() for file in folder.iterdir()}))
    return shas


def push(repo_id: str, seed: str) -> str:
    return with_memory(int(seed)).push_to_hub(repo_id)


def push_again(broken: str, killed: str) -> dict[str, Any]:
    """To `broken`, the connection breaks at every attempt of the first push, and once more."""
    memory = with_memory(seed=1)
    with patch("time.sleep"), pytest.raises(ConnectionError) as raised:
        memory.push_to_hub(broken)
    between = loaded_hash(broken)
    urls = [memory.push_to_hub(broken), push(killed, "2")]
    after = [loaded_hash(broken), loaded_hash(killed)]
    return {"message": str(raised.value), "between": between, "urls": urls, "after": after}


def load_again(reset: str, dropped: str, healed: str, sha: str) -> dict[str, Any]:
    hashes = [loaded_hash(reset, sha)]
    errors = [failed_load(reset)]
    cached = Path(os.environ["HF_HOME"], "hub", f"models--{reset.replace('/', '--')}")
    weights = len([*cached.glob(f"snapshots/*/{WEIGHTS}")])
    incomplete = [file.name for file in cached.rglob("*.incomplete")]
    errors += [failed_load(healed)] if ATTEMPTS == 1 else []
    hashes += [loaded_hash(reset, sha), loaded_hash(reset), loaded_hash(healed)]
    with patch("time.sleep"):
        errors.append(failed_load(dropped))
    with pytest.raises(ConnectionError, match="downloading from `me/slots`"):
        MemorySlots.load("me/slots")
    slots = digest(MemorySlots.load("me/slots"))
    hashes.append(loaded_hash(dropped))
    return {"hashes": hashes, "errors": errors, "weights": weights, "incomplete": incomplete, "slots": slots}


@pytest.mark.integration
def test_an_interrupted_upload_leaves_the_previous_commit(loopback_hub: HubServer, tmp_path: Path) -> None:
    before = {name: publish(loopback_hub, name, 0, folder=tmp_path / "0") for name in ("me/broken", "me/killed")}
    home, held = tmp_path / "home", Fault("POST", "/me/killed/commit/", hold=True)
    with loopback_hub.faulty(held):
        process = start_client(loopback_hub, home, push, "me/killed", "2", TMPDIR=str(tmp_path))
        try:
            assert held.reached.wait(timeout=120), process.communicate(timeout=1)
        finally:
            process.kill()
            process.communicate()
    assert any(method == "PUT" for method, _ in loopback_hub.requests), "the large file was there"
    assert list(loopback_hub.repos["me/killed"].commits) == before["me/killed"]

    broken = Fault("PUT", "/upload/", after=1000, times=ATTEMPTS + (ATTEMPTS > 1))
    with loopback_hub.faulty(broken):
        result = run_client(loopback_hub, home, push_again, "me/broken", "me/killed")
        assert broken.times == 0
    assert "The connection to the Hub broke while pushing to `me/broken`" in result["message"]
    assert "push again" in result["message"]
    assert result["between"] == logits_hash(with_memory(seed=0).model)
    assert result["after"] == [logits_hash(with_memory(seed).model) for seed in (1, 2)]
    for name, url in zip(before, result["urls"], strict=True):
        assert list(loopback_hub.repos[name].commits) == [*before[name], url.rpartition("/")[2]]


@pytest.mark.integration
def test_an_interrupted_download_is_not_loaded(loopback_hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "memories"
    sha, _ = publish(loopback_hub, "me/reset", 0, 1, folder=folder)
    publish(loopback_hub, "me/dropped", 2, folder=folder)
    publish(loopback_hub, "me/healed", 3, folder=folder)
    made("slots", 0).save(tmp_path / "slots.safetensors")
    repo = loopback_hub.repos["me/slots"] = Repo()
    repo.commit({"slots.safetensors": (tmp_path / "slots.safetensors").read_bytes()})
    faults = [
        Fault("GET", f"/me/reset/resolve/(?!{sha}).*/{WEIGHTS}", after=1000, reset=True),
        Fault("GET", f"/me/dropped/resolve/.*/{WEIGHTS}", after=1000, times=ATTEMPTS),
        Fault("GET", f"/me/healed/resolve/.*/{WEIGHTS}", after=1000),
        Fault("GET", r"/me/slots/resolve/.*\.safetensors", after=100, reset=True),
    ]
    with loopback_hub.faulty(*faults):
        result = run_client(loopback_hub, tmp_path / "home", load_again, "me/reset", "me/dropped", "me/healed", sha)
        assert [fault.times for fault in faults] == [0] * 4
    failed = ("me/reset", "me/dropped") if ATTEMPTS > 1 else ("me/reset", "me/healed", "me/dropped")
    for error, name in zip(result["errors"], failed, strict=True):
        assert error["error"] == "ConnectionError"
        assert f"The connection to the Hub broke while downloading from `{name}`" in error["message"]
        assert "load again" in error["message"]
        assert error["unchanged"]
    assert result["weights"] == 1, "of the commit that was loaded whole"
    assert result["incomplete"] == []
    assert result["hashes"] == [logits_hash(with_memory(seed).model) for seed in (0, 0, 1, 3, 2)]
    assert result["slots"] == digest(made("slots", 0))


def test_faults_end_with_their_context(loopback_hub: HubServer) -> None:
    with loopback_hub.faulty(Fault("GET", "/", times=2)):
        assert loopback_hub.fault_of("HEAD", "/") is None
        assert loopback_hub.fault_of("GET", "/") is not None
    assert loopback_hub.fault_of("GET", "/") is None


def test_what_is_no_broken_connection_passes_unchanged() -> None:
    """huggingface_hub wraps what goes wrong while a large file is uploaded."""

    class ForbiddenError(HTTPError, OSError):
        pass

    refused, removed = ForbiddenError("no access"), RuntimeError("removed")
    for raised, cause, seen in (
        (RuntimeError("while uploading"), refused, refused),
        (refused, None, refused),
        (removed, ValueError("something else"), removed),
    ):
        with pytest.raises((OSError, RuntimeError)) as caught, _connected("pushing", "Push again."):
            raise raised from cause
        assert caught.value is seen
