"""Publishing to ModelScope, through modelscope_hub."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from glob import escape
from pathlib import Path

from .._hashing import sha256
from .._version import __version__
from ..errors import HubError
from .modelscope import client, listed
from .refs import Ref
from .repository import RemoteFile
from .target import Target

_LOGIN = "log in with `modelscope login` or set MODELSCOPE_API_TOKEN, with a token that may write"
_BRANCH = "master"
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_PRIVATE = 1  # as ModelScope counts; 5 is public


class ModelScopeTarget(Target):
    """See `Target`."""

    def __init__(self, ref: Ref, endpoint: str | None = None, token: str | None = None) -> None:
        """See `open_target`."""
        self._api = client(endpoint, token)
        super().__init__(ref, self._api.legacy.endpoint)
        if not self._api.legacy.token:
            raise HubError(f"publishing to {self.endpoint} needs a token: {_LOGIN}.")

    @property
    def page(self) -> str:
        """See `Target`."""
        return f"{self.endpoint}/models/{self.ref.name}"

    def create(self, private: bool, licence: str | None) -> None:
        """See `Target`; the client would say Apache-2.0 where it is told no licence."""
        from modelscope_hub.errors import NotExistError

        with self._translated():
            try:
                self._api.legacy.get_repo_info(self.ref.name, "model")
            except NotExistError:
                self._api.create_repo(
                    self.ref.name,
                    "model",
                    visibility="private" if private else "public",
                    license=licence or "Other",
                )

    def is_private(self) -> bool:
        """See `Target`."""
        with self._translated():
            return bool(self._api.legacy.get_repo_info(self.ref.name, "model").get("Visibility") == _PRIVATE)

    def files(self) -> Mapping[str, RemoteFile]:
        """See `Target`."""
        with self._translated():
            entries = self._api.legacy.list_repo_files(self.ref.name, "model", _BRANCH)
        return {entry["Path"]: listed(entry, self.ref) for entry in entries if entry.get("Type") != "tree"}

    def upload(self, folder: Path, names: Collection[str]) -> str:
        """See `Target`."""
        smallest = min(names, key=lambda name: (folder / name).stat().st_size)
        asked = {"oid": sha256(folder / smallest), "size": (folder / smallest).stat().st_size}
        with (
            self._translated()
        ):  # the client says of a failed upload only that it failed, also for want of permission
            self._api.legacy.validate_blobs(self.ref.name, "model", [asked])
        # The client commits what it could upload, whatever became of the rest: what makes a model of it comes last.
        weights = [name for name in names if name.endswith(_WEIGHTS)]
        for part in (weights, [name for name in names if name not in weights]):
            if not part:
                continue
            with self._translated(), redirect_stdout(io.StringIO()):  # the client prints a report of its own
                self._api.upload_folder(
                    self.ref.name,
                    "model",
                    folder,
                    commit_message=f"Upload with glmquant {__version__}",
                    revision=_BRANCH,
                    allow_patterns=[escape(name) for name in part],
                    use_cache=False,  # it would lie in `folder`; the hub knows what it has
                )
        with self._translated():
            entries = self._api.legacy.list_repo_files(self.ref.name, "model", _BRANCH)
        return str(max(entries, key=lambda entry: entry.get("CommittedDate") or 0)["Revision"])

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turns the client's errors into one sentence."""
        import requests
        from modelscope_hub import errors

        again = "run the same command again to go on: what has been uploaded is kept"
        try:
            yield
        except (errors.AuthenticationError, errors.PermissionDeniedError, errors.NotExistError) as error:
            raise HubError(
                f"{self.endpoint} does not let this token write to {self.ref.name} (HTTP {error.status_code}): "
                f"check the name, or {_LOGIN} there."
            ) from None
        except (errors.NetworkError, requests.RequestException) as error:
            reason = type(error.__cause__ or error).__name__
            raise HubError(
                f"{self.endpoint} cannot be reached ({reason}); check the network, and {again}."
            ) from None
        except errors.InvalidParameter as error:
            raise HubError(f"{self.endpoint} refuses the upload ({str(error).rstrip('.')}).") from None
        except errors.APIError as error:
            many = " (too many requests)" if error.status_code == 429 else ""
            raise HubError(f"{self.endpoint} answered HTTP {error.status_code}{many}; {again}.") from None
        except (errors.HubError, RuntimeError) as error:
            said = str(error).partition("\n")[0].partition(". Please")[0].rstrip(".")
            raise HubError(f"the upload to {self.page} failed ({said}); {again}.") from None
