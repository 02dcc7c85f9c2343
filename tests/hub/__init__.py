"""A hub for tests: see `hub.server`."""

from .protocol import TOKEN, Fault, Request
from .repositories import Repository
from .server import HubServer

__all__ = ["TOKEN", "Fault", "HubServer", "Repository", "Request"]
