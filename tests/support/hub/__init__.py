"""What tests of memories need, here and in other projects: a Hub on the loopback interface."""

from tests.support.hub.hub_server import HubServer

__all__ = ["HubServer"]
