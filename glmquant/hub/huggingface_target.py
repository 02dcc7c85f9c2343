"""Publishing to Hugging Face, through huggingface_hub."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .._version import __version__
from ..errors import HubError
from .huggingface import listed, patiently
from .refs import Ref
from .repository import RemoteFile
from .target import Target

_LOGIN = "log in with `hf auth login` or set HF_TOKEN, with a token that may write"


class HuggingFaceTarget(Target):
    """See `Target`. Large files go first, and are kept by the hub; then one commit has everything appear at once."""

    def __init__(self, ref: Ref, endpoint: str | None = None, token: str | None = None) -> None:
        """See `open_target`."""
        from huggingface_hub import HfApi, get_token

        self._api = HfApi(endpoint, token, library_name="glmquant", library_version=__version__)
        super().__init__(ref, self._api.endpoint)
        if not (token or get_token()):
            raise HubError(f"publishing to {self.endpoint} needs a token: {_LOGIN}.")

    @property
    def page(self) -> str:
        """See `Target`."""
        return f"{self.endpoint}/{self.ref.name}"

    def create(self, private: bool, licence: str | None) -> None:
        """See `Target`; the licence is in the card, and some organizations keep everything private."""
        with self._translated():
            patiently(
                partial(
                    self._api.create_repo,
                    self.ref.name,
                    private=private or None,
                    repo_type="model",
                    exist_ok=True,
                )
            )

    def is_private(self) -> bool:
        """See `Target`."""
        with self._translated():
            return bool(patiently(partial(self._api.model_info, self.ref.name)).private)

    def files(self) -> Mapping[str, RemoteFile]:
        """See `Target`."""
        with self._translated():
            info = patiently(partial(self._api.model_info, self.ref.name, files_metadata=True))
        return {s.rfilename: listed(s, self.ref) for s in info.siblings or ()}

    def upload(self, folder: Path, names: Collection[str]) -> str:
        """See `Target`."""
        from huggingface_hub import CommitOperationAdd

        def commit() -> str:
            added = [CommitOperationAdd(name, str(folder / name)) for name in names]
            message = f"Upload with glmquant {__version__}"
            return str(self._api.create_commit(self.ref.name, added, commit_message=message).oid)

        with self._translated():
            return patiently(commit)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turns the client's errors into one sentence."""
        import httpx2
        from huggingface_hub import errors

        again = "run the same command again to go on: what has been uploaded is kept"
        try:
            yield
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403, 404):
                raise HubError(
                    f"{self.endpoint} does not let this token write to {self.ref.name} (HTTP {status}): check the "
                    f"name, or {_LOGIN} there."
                ) from None
            said = str(error.server_message or "").partition("\n")[0].rstrip(".")
            if status in (400, 413, 422):
                raise HubError(f"{self.endpoint} refuses the upload (HTTP {status}: {said}).") from None
            raise HubError(
                f"{self.endpoint} answered HTTP {status}{' (too many requests)' if status == 429 else ''}; {again}."
            ) from None
        except (httpx2.HTTPError, errors.OfflineModeIsEnabled, ConnectionError) as error:
            reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
            raise HubError(
                f"{self.endpoint} cannot be reached ({reason}); check the network, and {again}."
            ) from None
        except RuntimeError as error:  # what the client makes of failures in its threads
            raise HubError(f"the upload to {self.page} failed ({error}); {again}.") from None
