"""The headers of weight files on a hub, read by ranges: kilobytes of files of gigabytes.

What has been read is written into files of the full size that are holes elsewhere, so that the libraries which
read, and check, whole files read these.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.files import WeightFiles
from ..checkpoint.source import BinSource, SafetensorsSource, TensorInfo, load_bin
from ..errors import HubError, SourceError
from .repository import Repository

# Of most shards the whole header; the rest takes one request more.
_FIRST = 64 << 10
_LARGEST_HEADER = 100_000_000  # the safetensors library's own limit
# The directory of a .bin with a thousand tensors; the second if there are even more.
_TAILS = (128 << 10, 4 << 20)
_AT_ONCE = 8
_LOCAL_HEADER = 4096  # of a zip entry: 30 bytes, its name, and padding


def read_infos(repository: Repository, weights: WeightFiles) -> Mapping[str, TensorInfo]:
    """Every tensor of `weights` by name.

    Raises:
        SourceError: a header is damaged.
        UnsafeFileError: a ``.bin`` asks for more than tensors.
        HubError: the hub does not give what is needed.
    """
    if weights.shards[0].endswith(".gguf"):
        raise SourceError(
            f"the weights of {repository.ref} are a GGUF file, which is read only where it is whole: run `glmquant "
            f"download {repository.ref} --local-dir DIR`, and name DIR instead."
        )
    safetensors = weights.shards[0].endswith(".safetensors")
    with tempfile.TemporaryDirectory(prefix="glmquant-headers-") as scratch:
        folder = Path(scratch)
        try:
            for shard in weights.shards:
                (folder / shard).parent.mkdir(parents=True, exist_ok=True)
            outline = partial(_outline_safetensors if safetensors else _outline_bin, repository, folder)
            with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="glmquant-headers") as pool:
                deque(pool.map(outline, weights.shards), maxlen=0)
            kind = SafetensorsSource if safetensors else _OutlinedBinSource
            return dict(kind(folder, weights).infos())
        except SourceError as error:
            # Nobody knows the scratch folder.
            raise type(error)(str(error).replace(f"{folder}/", f"{repository.ref}/")) from None
        except OSError as error:  # for example a size that no file system can hold
            raise HubError(
                f"the headers of {repository.ref} cannot be kept in {folder.parent} ({error.strerror}); are the listed "
                "sizes of its files right?"
            ) from None


class _OutlinedBinSource(BinSource):
    """Reads shapes and dtypes and no data, which is not there."""

    def _open_shard(self, path: Path) -> dict[str, Any]:
        import torch

        with torch.serialization.skip_data():
            return load_bin(path)


def _outline_safetensors(repository: Repository, folder: Path, shard: str) -> None:
    size = repository.files[shard].size
    start = repository.read(shard, 0, min(size, _FIRST))
    end = 8 + int.from_bytes(start[:8], "little")
    if len(start) < end <= min(size, 8 + _LARGEST_HEADER):
        start += repository.read(shard, len(start), end)
    # A header that is too long to be one is left to the library, which says so.
    with (folder / shard).open("wb") as file:
        file.write(start[:end])
        file.truncate(size)


def _outline_bin(repository: Repository, folder: Path, shard: str) -> None:
    """The directory at the end of the zip file, and the pickle at its beginning, which names the tensors."""
    size, path = repository.files[shard].size, folder / shard
    with path.open("wb") as file:
        file.truncate(size)
        for length in _TAILS:
            first = max(0, size - length)
            file.seek(first)
            file.write(repository.read(shard, first, size))
            file.flush()
            directory = _directory(path)
            if directory is not None:
                break
        else:
            # Not a zip file: what it begins with tells what it is.
            file.seek(0)
            file.write(repository.read(shard, 0, min(size, 64)))
            return
        pickles = [e for e in directory if e.filename.endswith(("/data.pkl", "/byteorder", "/version"))]
        end = max(
            (e.header_offset + e.file_size + _LOCAL_HEADER for e in pickles if e.header_offset < first),
            default=0,
        )
        if end > _LARGEST_HEADER:
            raise SourceError(f"{path} has a table of contents of {end} bytes, too much for a checkpoint.")
        file.seek(0)
        file.write(repository.read(shard, 0, min(first, end)))


def _directory(path: Path) -> list[zipfile.ZipInfo] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, io.UnsupportedOperation, ValueError, OSError):
        return None
