"""Fixtures: data folder, one seed, no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import network

network.refuse_the_network()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["tests.support.hub.fixtures"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that processes that share the tests end together."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of evaluation data, named by MEMORY_ADAPTERS_DATA."""
    folder = os.environ.get("MEMORY_ADAPTERS_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MEMORY_ADAPTERS_DATA names no folder with evaluation data")
    return Path(folder)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    network.attempts.clear()
    yield
    assert not network.attempts, "a test reached beyond this machine, even if the refusal was caught"
