"""Files of tensors that a later run goes on from: on disk, and known by their hashes, before they count."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ._hashing import sha256
from .checkpoint.output import replace_file
from .errors import OutputError

_HASHES = "hashes.json"


class KeptTensors:
    """Named groups of tensors in a folder, ``NAME.safetensors`` each, and a list of their SHA-256.

    A power cut, a disk or a hand may leave other bytes than were saved: such a file is as good as absent.

    Args:
        folder: is made when something is saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hashes: dict[str, str] = {}
        with suppress(OSError, ValueError, TypeError):  # a damaged list vouches for nothing
            self._hashes = dict(json.loads((folder / _HASHES).read_text()))

    def is_whole(self, name: str) -> bool:
        """Whether `name` was saved, and is as it was; reads all of it."""
        file = self._file(name)
        return file.name in self._hashes and file.is_file() and sha256(file) == self._hashes[file.name]

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of a `name` that `is_whole`."""
        found: dict[str, Tensor] = load_file(self._file(name))
        return found

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Whole or not at all, also where the power goes.

        Raises:
            OutputError: there is no room, or the folder cannot be written.
        """
        file = self._file(name)
        fresh = file.with_suffix(".new")
        try:
            self._folder.mkdir(exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, fresh)
            with fresh.open("rb+") as written:
                os.fsync(written.fileno())
            self._hashes[file.name] = sha256(fresh)
            fresh.replace(file)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"cannot keep what calibration has found in {self._folder} ({error}). Free some space and run the "
                "same command with --resume."
            ) from None
        self._list()

    def drop(self, name: str) -> None:
        """Remove `name`, if it is there."""
        if self._hashes.pop(self._file(name).name, None) is not None:
            self._list()
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _list(self) -> None:
        replace_file(self._folder / _HASHES, json.dumps(self._hashes).encode())
