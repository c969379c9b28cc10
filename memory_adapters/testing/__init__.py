"""What tests of memories need, here and in other projects: a Hub on the loopback interface."""

from memory_adapters.testing.hub_server import HubServer

__all__ = ["HubServer"]
