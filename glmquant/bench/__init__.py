"""``glmquant bench``: how fast checkpoints run, and in how much memory, each in a process of its own."""

from __future__ import annotations
