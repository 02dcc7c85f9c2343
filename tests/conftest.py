"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from hub import HubServer

# The same examples in every run, so that a failure is that of the change at hand; --hypothesis-profile=explore looks
# for new ones. No deadline: on a busy machine any single example may take long.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("same")


def pytest_configure() -> None:
    """Let Ctrl-C work, also where the tests run as a shell's background job: those are started with SIGINT ignored,
    which child processes would inherit.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault(
            "TRITON_INTERPRET", "1"
        )  # read when Triton is imported: its kernels run on the CPU


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on this machine, which the real clients use; see `hub.server`."""
    from helpers_hub import running_hub

    with running_hub(tmp_path, monkeypatch) as running:
        yield running
