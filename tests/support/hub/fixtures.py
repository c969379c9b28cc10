"""Fixtures for pytest: `pytest_plugins = ["tests.support.hub.fixtures"]` in a top-level conftest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.hub.hub_server import HubServer

__all__ = ["loopback_hub"]


@pytest.fixture(scope="module")
def loopback_hub() -> Iterator[HubServer]:
    """An empty Hub on the loopback interface, one for each test module."""
    with HubServer() as server:
        yield server
