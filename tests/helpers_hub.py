"""For tests that talk to a hub: a server, and clients that know nothing of this machine's caches."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub import HubServer


@contextmanager
def running_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, which both clients of this process and of its children use, with empty caches."""
    from huggingface_hub import constants
    from modelscope_hub import config as modelscope_config

    with HubServer() as running:
        for name, value in client_environment(running, tmp_path).items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        # huggingface_hub has read the environment when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", os.environ["HF_HUB_CACHE"])
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # What the client writes at a time, and so what it can resume: ten megabytes otherwise.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
        monkeypatch.setattr(modelscope_config, "_default_config", None, raising=False)
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
        yield running


def client_environment(server: HubServer, home: Path) -> dict[str, str]:
    """Settings of the clients' own that lead them to `server` and to caches below `home`."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_CACHE": str(home / "hf" / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MODELSCOPE_ENDPOINT": server.url,
        "MODELSCOPE_CACHE": str(home / "ms"),
        "MODELSCOPE_HOME": str(home / "ms-home"),
        "NO_PROXY": "127.0.0.1,localhost",
    }
