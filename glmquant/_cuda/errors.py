"""The one way in which anything here gives up."""

from __future__ import annotations


class UnavailableError(Exception):
    """The kernels cannot be used; says why in a sentence without its full stop. Never leaves the package."""
