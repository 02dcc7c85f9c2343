"""Hugging Face, through huggingface_hub: its cache, its login, its settings (``HF_ENDPOINT``, ``HF_TOKEN``, ...)."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .._version import __version__
from ..errors import HubError, OutputError
from .refs import Ref
from .repository import OnBytes, RemoteFile, Repository, check_size

T = TypeVar("T")

_ATTEMPTS = 4
_BUSY = (429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 60


class HuggingFace(Repository):
    """See `Repository`."""

    def __init__(self, ref: Ref, endpoint: str | None = None, token: str | None = None) -> None:
        """Look up a repository.

        Raises:
            HubError: there is none, or nobody answers.
        """
        from huggingface_hub import HfApi

        self._api = HfApi(endpoint, token, library_name="glmquant", library_version=__version__)
        super().__init__(ref, self._api.endpoint)
        self._token = token
        with self._translated():
            info = patiently(
                partial(
                    self._api.model_info, ref.name, revision=ref.revision, files_metadata=True, timeout=30
                )
            )
        if not info.sha:
            raise HubError(f"{self.endpoint} does not say which commit {ref} is; use another mirror.")
        self.commit = info.sha
        self.files = {s.rfilename: listed(s, ref) for s in info.siblings or ()}

    @property
    def cache(self) -> Path:
        """See `Repository`."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def cached(self, name: str) -> Path | None:
        """See `Repository`."""
        path = cached_file(self.ref.name, name, self.commit)
        return path if path is not None and path.stat().st_size == self.files[name].size else None

    def read(self, name: str, start: int, stop: int) -> bytes:
        """See `Repository`."""
        import httpx2

        with self._translated(name):
            for attempt in range(_ATTEMPTS):
                try:
                    content = self._span(name, start, stop)
                    break
                except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError):
                    if attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(2**attempt)
        if len(content) != stop - start:
            raise HubError(
                f"{self.endpoint} gave {len(content)} of {stop - start} bytes of {name}; try again."
            )
        return content

    def _span(self, name: str, start: int, stop: int) -> bytes:
        """Bytes of a file; where a mirror ignores what was asked for and sends all of it, no more than these are kept,
        and what comes behind them is not read.
        """
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

        headers = {**self._headers, "Range": f"bytes={start}-{stop - 1}"}
        content = bytearray()
        with http_stream_backoff(
            "GET", self._url(name), headers=headers, follow_redirects=True, retry_on_exceptions=()
        ) as answer:
            hf_raise_for_status(answer)
            before = 0 if answer.status_code == 206 else start
            for piece in answer.iter_bytes(1 << 16):
                content += piece[before:]
                before = max(0, before - len(piece))
                if len(content) >= stop - start:
                    break
        return bytes(content[: stop - start])

    def _fetch(self, name: str, folder: Path | None, again: bool, on_bytes: OnBytes | None) -> Path:
        from huggingface_hub import hf_hub_download

        if folder is not None:
            return self._resumed(name, folder / name, again, on_bytes or (lambda count: None))
        with self._translated(name):
            # Asking for the revision by its name lets the cache remember what it was, for work without a network.
            by_name = name == "config.json"
            path = hf_hub_download(
                self.ref.name,
                name,
                revision=self.ref.revision if by_name else self.commit,
                force_download=again,
                endpoint=self.endpoint,
                token=self._token,
                library_name="glmquant",
                library_version=__version__,
                tqdm_class=_counter(on_bytes or (lambda count: None)),
            )
        if by_name and self.cached(name) is None:
            raise HubError(f"{self.ref} was changed on the hub at this moment; run the same command again.")
        return Path(path)

    def _resumed(self, name: str, target: Path, again: bool, on_bytes: OnBytes) -> Path:
        """Download into a folder, going on from what an interrupted process left.

        The client's own way into a folder begins every file anew in every process.
        """
        from huggingface_hub.file_download import http_get

        size = self.files[name].size
        part = target.with_name(target.name + ".incomplete")
        if again:
            target.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file, self._translated(name):
            if file.tell() > size:
                file.truncate(0)
                file.seek(0)
            on_bytes(file.tell())
            http_get(
                self._url(name),
                file,
                resume_size=file.tell(),
                headers=self._headers,
                expected_size=size,
                tqdm_class=_counter(on_bytes),
            )
        part.replace(target)
        return target

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        url: str = hf_hub_url(self.ref.name, name, revision=self.commit, endpoint=self.endpoint)
        return url

    @property
    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        headers = build_hf_headers(token=self._token, library_name="glmquant", library_version=__version__)
        return {**headers, "Accept-Encoding": "identity"}

    @contextmanager
    def _translated(self, file: str | None = None) -> Iterator[None]:
        """Turns the client's errors into one sentence."""
        import httpx2
        from huggingface_hub import errors

        ref = self.ref
        page = f"{self.endpoint}/{ref.name}"
        try:
            yield
        except errors.GatedRepoError:
            raise HubError(
                f"{ref} is gated: ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN."
            ) from None
        except errors.RepositoryNotFoundError:
            raise HubError(
                f"{self.endpoint} has no model {ref.name}, or it is private: check the name, or log in with "
                f"`hf auth login` or set HF_TOKEN{ref.elsewhere}."
            ) from None
        except errors.RevisionNotFoundError:
            raise HubError(
                f"{ref.name} has no revision {ref.revision}; {page}/tree/main shows what it has."
            ) from None
        except errors.RemoteEntryNotFoundError:
            raise HubError(f"{ref} does not hold {file}; it was listed a moment ago, try again.") from None
        except errors.LocalEntryNotFoundError as error:
            # raised when a file is neither to be had nor in the cache; the reason is behind it
            raise self._unreachable(error.__cause__ or error) from None
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise HubError(
                    f"{self.endpoint} refuses {ref} (HTTP {status}): log in with `hf auth login` or set HF_TOKEN."
                ) from None
            raise HubError(
                f"{self.endpoint} answered HTTP {status} for {file or ref.name}"
                f"{' (too many requests)' if status == 429 else ''}; later, {self.advice}."
            ) from None
        except (httpx2.HTTPError, errors.OfflineModeIsEnabled) as error:
            raise self._unreachable(error) from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OutputError(
                    f"the disk became full while {file} was being downloaded; free some space."
                ) from None
            if "Consistency check failed" in str(error):
                raise HubError(
                    f"{self.endpoint} sent {file} with another size than it lists; run the same command again."
                ) from None
            raise

    def _unreachable(self, error: BaseException) -> HubError:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        return HubError(
            f"{self.endpoint} cannot be reached ({reason}); check the network, or name a mirror with --endpoint or "
            f"HF_ENDPOINT{self.ref.elsewhere}. Then {self.advice}."
        )


def cached_file(model: str, name: str, revision: str) -> Path | None:
    """Where the cache holds a file of a revision."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def listed(sibling: Any, ref: Ref) -> RemoteFile:
    """A file of a listing."""
    name, lfs = sibling.rfilename, sibling.lfs
    size = check_size(lfs.size if lfs else sibling.size, name, ref)
    return RemoteFile(name, size, lfs.sha256 if lfs else None, sibling.blob_id if not lfs else None)


def patiently(ask: Callable[[], T]) -> T:
    """Ask again, as a hub that is busy wants it; huggingface_hub does so for files and not for listings."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(_ATTEMPTS):
        try:
            return ask()
        except HfHubHTTPError as error:
            answer = error.response
            asked = answer.headers.get("Retry-After", "")
            wait = int(asked) if asked.isdigit() else 2**attempt
            if answer.status_code not in _BUSY or attempt == _ATTEMPTS - 1 or wait > _LONGEST_WAIT_S:
                raise
            time.sleep(wait)
    raise AssertionError


def _counter(on_bytes: OnBytes) -> type[Any]:
    """A progress bar of the client's kind that shows nothing and counts."""
    from tqdm import tqdm

    class Counter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            on_bytes(int(n or 0))
            return None

    return Counter
