"""ModelScope, through modelscope_hub: its cache, its login, its settings (``MODELSCOPE_ENDPOINT``, ...)."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import HubError, OutputError
from .refs import Ref
from .repository import OnBytes, RemoteFile, Repository, check_size

_DEFAULT = "master"
_ATTEMPTS = 4


class ModelScope(Repository):
    """See `Repository`.

    Files are asked for by the name of the revision, so that the cache is the one that modelscope itself uses; that
    they are those of the commit is checked by their hashes.
    """

    def __init__(self, ref: Ref, endpoint: str | None = None, token: str | None = None) -> None:
        """Look up a repository.

        Raises:
            HubError: there is none, or nobody answers.
        """
        self._api = client(endpoint, token)
        super().__init__(ref, self._api.legacy.endpoint)
        with self._translated():
            entries = self._api.legacy.list_repo_files(ref.name, "model", self._revision)
        entries = [entry for entry in entries if entry.get("Type") != "tree"]
        if not entries:
            # What ModelScope answers for a revision that does not exist, too.
            raise HubError(
                f"{ref.name} has no revision {self._revision}, or nothing is in it; see {self._page}/files."
            )
        self.files = {entry["Path"]: listed(entry, ref) for entry in entries}
        # The listing that clients get names no commit but the last one of every file.
        newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0)
        self.commit = newest.get("Revision") or self._revision

    @property
    def _revision(self) -> str:
        return self.ref.revision or _DEFAULT

    @property
    def _page(self) -> str:
        return f"{self.endpoint}/models/{self.ref.name}"

    @property
    def cache(self) -> Path:
        """See `Repository`."""
        from modelscope_hub.config import get_default_config

        return Path(get_default_config().cache_dir)

    def cached(self, name: str) -> Path | None:
        """See `Repository`; what lies there may be of an earlier commit, so it is hashed."""
        path = cached_file(self._api, self.ref.name, name, self._revision)
        return path if path is not None and self.is_whole(name, path) else None

    def read(self, name: str, start: int, stop: int) -> bytes:
        """See `Repository`."""
        from modelscope_hub.errors import HubError as ClientError

        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with self._translated(name):
            for attempt in range(_ATTEMPTS):
                try:
                    # Files in git come whole, whatever the range; those are small.
                    with self._api.legacy.download_stream(
                        self.ref.name, "model", name, self._revision, headers
                    ) as answer:
                        skipped = 0 if answer.status_code == 206 else start
                        content = b""
                        for piece in answer.iter_content(1 << 16):
                            content += piece
                            if len(content) >= skipped + stop - start:
                                break
                    content = content[skipped : skipped + stop - start]
                    break
                except (ClientError, OSError) as error:
                    busy = getattr(error, "retryable", True)
                    if not busy or attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(2**attempt)
        if len(content) != stop - start:
            raise HubError(
                f"{self.endpoint} gave {len(content)} of {stop - start} bytes of {name}; try again."
            )
        return content

    def _fetch(self, name: str, folder: Path | None, again: bool, on_bytes: OnBytes | None) -> Path:
        from modelscope_hub._download import ProgressCallback

        class Counter(ProgressCallback):
            def update(self, size: int) -> None:
                if on_bytes is not None:
                    on_bytes(size)

        file = self.files[name]
        with self._translated(name):
            return Path(
                self._api.downloader.download_file(
                    self.ref.name,
                    "model",
                    name,
                    revision=self._revision,
                    local_dir=folder,
                    force=again,
                    expected_sha256=file.sha256,
                    file_size=file.size,
                    progress_callbacks=[Counter],
                )
            )

    @contextmanager
    def _translated(self, file: str | None = None) -> Iterator[None]:
        """Turns the client's errors into one sentence."""
        import requests
        from modelscope_hub import errors

        ref = self.ref
        login = "log in with `modelscope login` or set MODELSCOPE_API_TOKEN"
        try:
            yield
        except errors.NotExistError:
            raise HubError(
                f"{self.endpoint} has no model {ref.name}{f' with {file}' if file else ''}, or it is private: check "
                f"the name, or {login}{ref.elsewhere}."
            ) from None
        except (errors.AuthenticationError, errors.PermissionDeniedError):
            raise HubError(
                f"{ref} is not open to everybody: ask for access at {self._page}, then {login}."
            ) from None
        except errors.FileIntegrityError:
            raise HubError(
                f"{file} of {ref} came again and again with another content than {self.endpoint} lists; it was "
                "removed. Try again later."
            ) from None
        except (errors.NetworkError, requests.RequestException) as error:
            reason = type(error.__cause__ or error).__name__
            raise HubError(
                f"{self.endpoint} cannot be reached ({reason}); check the network, or name another address with "
                f"--endpoint or MODELSCOPE_ENDPOINT{ref.elsewhere}. Then {self.advice}."
            ) from None
        except errors.APIError as error:
            raise HubError(
                f"{self.endpoint} answered HTTP {error.status_code} for {file or ref.name}"
                f"{' (too many requests)' if error.status_code == 429 else ''}; later, {self.advice}."
            ) from None
        except errors.HubError as error:
            raise HubError(f"{ref} cannot be downloaded from {self.endpoint} ({error}).") from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OutputError(
                    f"the disk became full while {file} was being downloaded; free some space."
                ) from None
            raise


def listed(entry: dict[str, Any], ref: Ref) -> RemoteFile:
    """A file of a listing."""
    name = entry["Path"]
    return RemoteFile(name, check_size(entry.get("Size"), name, ref), entry.get("Sha256") or None)


def client(endpoint: str | None = None, token: str | None = None) -> Any:
    """The hub's client."""
    from modelscope_hub import HubApi

    # The client tells of every retry; what matters comes as an error.
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
    return HubApi(endpoint=endpoint, token=token)


def cached_file(api: Any, model: str, name: str, revision: str | None) -> Path | None:
    """Where the cache holds a file of a revision."""
    from modelscope_hub.errors import CacheNotFound

    try:
        return Path(api.download_file(model, "model", name, revision=revision, local_files_only=True))
    except CacheNotFound:
        return None


def offline_file(model: str, name: str, revision: str | None) -> Path | None:
    """Where the cache holds a file, without a word to the network."""
    return cached_file(client(), model, name, revision)
