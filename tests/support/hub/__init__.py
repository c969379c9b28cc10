"""A Hugging Face Hub on the loopback interface, for tests."""

from tests.support.hub.hub_server import HubServer

__all__ = ["HubServer"]
