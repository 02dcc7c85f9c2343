"""Repositories as hubs keep them: commits, branches, and files that are either in git or in large file storage."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_LARGE = (".bin", ".safetensors", ".model", ".gguf")


@dataclass(frozen=True)
class StoredFile:
    """The content of a file, and the hashes by which hubs know it."""

    data: bytes | mmap.mmap
    large: bool
    sha256: str
    blob_id: str

    @classmethod
    def of(cls, name: str, data: bytes | mmap.mmap) -> StoredFile:
        blob = hashlib.sha1(b"blob %d\0" % len(data))
        blob.update(data)
        return cls(data, name.endswith(_LARGE), hashlib.sha256(data).hexdigest(), blob.hexdigest())

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id


@dataclass
class Repository:
    """One repository. `readable` and `gated` say who gets in: anyone, those with a token, or those it was granted.

    `listing` replaces facts in the listings, for repositories that lie: ``{name: {"size": 10}}``.
    """

    name: str
    private: bool = False
    gated: bool = False
    default: str = "main"
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    listing: dict[str, dict[str, int | str]] = field(default_factory=dict)

    def stored(self, sha256: str) -> StoredFile | None:
        """A large file of any commit."""
        return next(
            (f for files in self.commits.values() for f in files.values() if f.sha256 == sha256), None
        )

    def commit(self, files: Mapping[str, bytes | mmap.mmap], branch: str | None = None) -> str:
        """Add or replace files on a branch; returns the commit."""
        branch = branch or self.default
        content = dict(self.commits.get(self.branches.get(branch, ""), {}))
        content.update({name: StoredFile.of(name, data) for name, data in files.items()})
        text = self.branches.get(branch, "") + "".join(f"{n} {f.blob_id}\n" for n, f in content.items())
        made = hashlib.sha1(f"{branch}\n{text}".encode()).hexdigest()
        self.commits[made] = content
        self.branches[branch] = made
        return made

    def commit_folder(self, folder: Path, branch: str | None = None) -> str:
        """Add every file of a folder."""
        files = {str(p.relative_to(folder)): _content(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.commit(files, branch)

    def resolve(self, revision: str) -> str | None:
        """A branch or a commit to a commit."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def size_of(self, name: str, file: StoredFile) -> int:
        """The size that listings state."""
        return int(self.listing.get(name, {}).get("size", len(file.data)))

    def sha256_of(self, name: str, file: StoredFile) -> str:
        """The SHA-256 that listings state."""
        return str(self.listing.get(name, {}).get("sha256", file.sha256))


def _content(path: Path) -> bytes | mmap.mmap:
    if path.stat().st_size < 1 << 24:
        return path.read_bytes()
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
