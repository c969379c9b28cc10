"""Fixtures: the data folder, the real model, one seed, no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import network

# Before anything imports huggingface_hub, which reads its settings once.
network.refuse_the_network()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["tests.support.hub.fixtures"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files of the longest tests first, so that processes that share the tests end together."""
    ranks: dict[Path, int] = {}
    for item in items:
        own = 2 if item.get_closest_marker("real") else 1 if item.get_closest_marker("integration") else 0
        ranks[item.path] = max(own, ranks.get(item.path, 0))
    items.sort(key=lambda item: -ranks[item.path])


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of evaluation data, named by MEMORY_ADAPTERS_DATA."""
    folder = os.environ.get("MEMORY_ADAPTERS_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MEMORY_ADAPTERS_DATA names no folder with evaluation data")
    return Path(folder)


@pytest.fixture(scope="session")
def real_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memory_adapters.embedded_model import embedded_model

    name = embedded_model()
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests' covariances apart from the user's; locks and the embedded model are the user's."""
    from memory_adapters.files.locks import cache_folder

    user, own = cache_folder(), tmp_path_factory.mktemp("cache")
    with suppress(OSError):
        for name in ("locks", "smollm2-135m-instruct"):
            (user / name).mkdir(parents=True, exist_ok=True)
            (own / name).symlink_to(user / name, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMORY_ADAPTERS_CACHE", str(own))
        yield


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    network.attempts.clear()
    yield
    assert not network.attempts, "a test reached beyond this machine, even if the refusal was caught"
