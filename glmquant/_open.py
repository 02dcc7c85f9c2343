"""From what a user typed to a source of weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import families, formats, hub
from .checkpoint.adapter import AdapterSource, with_adapter
from .checkpoint.decoded import DecodedSource
from .checkpoint.source import TensorSource, open_folder
from .formats import Format
from .hub.source import HubSource

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class OpenedSource:
    """A source of weights, and how they were stored. What only sources on a hub need does nothing for others."""

    source: TensorSource
    folder: Path
    stored_as: Format
    adapter: Path | None
    remote: HubSource | None = None
    """set where `source` reads from a hub"""

    def fetch_sidecars(self) -> None:
        """Have the files beside the weights in `folder`."""
        if self.remote is not None:
            self.remote.fetch_sidecars()

    def keep_in(self, scratch: Path | None) -> int:
        """Say where fetched weights are to lie: in `scratch`, until they are released, or for good in the cache of the
        hub's client (None). Returns the most that they will take there, in bytes.
        """
        if self.remote is None:
            return 0
        self.remote.keep_in(scratch)
        return self.remote.peak_bytes

    @property
    def deletes(self) -> bool:
        """Whether what was read of the source is deleted when it is released."""
        return self.remote is not None and self.remote.deletes

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """While weights are fetched; what lay in `scratch` is gone afterwards if all went well."""
        try:
            yield
            if self.remote is not None:
                self.remote.discard()
        finally:
            self.stop_fetching()

    def on_fetched(self, call: Callable[[str, int, int], None]) -> None:
        """Have `call` told of a shard's name, the bytes of it that are here, and its size."""
        if self.remote is not None:
            self.remote.on_shard = call

    def stop_fetching(self) -> None:
        """Let nobody wait any longer for something on a hub."""
        if self.remote is not None:
            self.remote.close()

    @property
    def remote_files(self) -> dict[str, dict[str, object]]:
        """Size and SHA-256 of the files of weights on a hub, by name, as in a report."""
        if self.remote is None:
            return {}
        files = (self.remote.repository.files[shard] for shard in self.remote.weights.shards)
        return {file.name: {"bytes": file.size, "sha256": file.sha256} for file in files}


def open_described(ref: PathLike) -> TensorSource:
    """Open a checkpoint as it is stored: a folder, or a model on a hub, of which headers alone are read.

    Raises:
        SourceError: it is no sound checkpoint.
        HubError: the hub does not give it.
    """
    found = hub.resolve(ref)
    if found.folder is None and not hub.is_offline():
        return HubSource(hub.open_repository(found))
    return open_folder(found.folder or hub.offline_folder(found))


def open_source(ref: PathLike, adapter: PathLike | None = None) -> OpenedSource:
    """Open a checkpoint for conversion, decoding what is quantized and merging `adapter`, or a LoRA that lies in the
    folder, on the way.

    Raises:
        SourceError: it is no sound checkpoint of a known family.
        QuantizedSourceError: it is quantized in a way that is not known here.
    """
    found = hub.resolve(ref)
    if found.folder is not None:
        ref, adapter = with_adapter(found.folder, adapter)
    source = open_described(ref)
    remote = source if isinstance(source, HubSource) else None
    folder = source.folder
    family = families.detect(source.config)
    dims = family.dims(source.config)
    stored_as = formats.detect(source.config)
    if stored_as.quantized(source.config, family, dims):
        source = DecodedSource(source, stored_as, family, dims)
    if adapter is not None:
        source = AdapterSource(source, Path(adapter).expanduser(), family, dims)
    return OpenedSource(
        source, folder, stored_as, Path(adapter).expanduser() if adapter is not None else None, remote
    )
