"""A checkpoint on a hub as a `TensorSource`: headers by ranges, shards when they are needed."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.files import WeightFiles, read_json
from ..checkpoint.source import TensorInfo, TensorSource, open_shard
from ..errors import SourceError
from .fetching import check_room, fetch_description, fetch_sidecars, find_remote_weights
from .headers import read_infos
from .repository import OnBytes, Repository, Stopped, bytes_begun

if TYPE_CHECKING:
    import torch

OnShard = Callable[[str, int, int], None]
"""Called with the name of a shard, the bytes of it that are here, and its size."""

_PATIENCE_S = 1.0  # clients notice that they are to stop when the next bytes come


class HubSource:
    """Shards come one after the other, in one thread, in the order in which they were announced by `prefetch`.

    A second thread compares the hash of the one that has come with what the hub lists, while the next is on its way.

    By default into the cache of the hub's own client, where they stay; `keep_in` has them in a scratch folder, and
    deleted as soon as they are released. What is in the cache already is used from there.
    """

    # Nothing to be hashed: files are, as they arrive.
    files: tuple[Path, ...] = ()

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.folder = fetch_description(repository)
        self.config: dict[str, Any] = read_json(self.folder / "config.json")
        self.weights: WeightFiles = find_remote_weights(repository, self.folder)
        self.on_shard: OnShard | None = None
        self._scratch: Path | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._wanted: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._shards: dict[str, Future[TensorSource]] = {}
        self._thread: threading.Thread | None = None

    @cached_property
    def _infos(self) -> Mapping[str, TensorInfo]:
        return read_infos(self.repository, self.weights)

    def infos(self) -> Mapping[str, TensorInfo]:
        """See `TensorSource`."""
        return self._infos

    def fetch_sidecars(self) -> None:
        """Put the tokenizer and the other files beside the weights into `folder`."""
        fetch_sidecars(self.repository)

    def keep_in(self, scratch: Path | None) -> None:
        """Keep shards in the folder `scratch`, each only until it is released; None: in the client's cache, for good.

        Raises:
            OutputError: the cache has no room for them.
        """
        self._scratch = scratch
        if scratch is not None:
            self.repository.advice = (
                "run the same command with --resume to go on from what has been quantized; without it "
                "everything is fetched again"
            )
        else:
            self.repository.note_kept()
            check_room(self.missing_bytes, self.folder)

    @property
    def peak_bytes(self) -> int:
        """The most that shards will take in the scratch folder beyond what an earlier run left there: one in work, one
        on its way.
        """
        if self._scratch is None:
            return 0
        left = sum(bytes_begun(self._scratch / shard) for shard in self.weights.shards)
        left += sum(p.stat().st_size for s in self.weights.shards if (p := self._scratch / s).is_file())
        return max(0, sum(sorted(self._missing())[-2:]) - left)

    @property
    def missing_bytes(self) -> int:
        """What has to be fetched of the weights."""
        return sum(self._missing())

    def _missing(self) -> list[int]:
        """Sizes of the shards that have to be fetched."""
        repository = self.repository
        return [repository.files[s].size for s in self.weights.shards if repository.cached(s) is None]

    @property
    def deletes(self) -> bool:
        """Whether `release` deletes what was fetched."""
        return self._scratch is not None

    def prefetch(self, shard: str) -> None:
        """See `TensorSource`."""
        with self._lock:
            if self._stopped.is_set():
                raise Stopped  # nobody will fetch it any more
            if shard in self._shards:
                return
            self._shards[shard] = Future()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="glmquant-fetch", daemon=True)
                self._thread.start()
        self._wanted.put(shard)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See `TensorSource`; waits for the shard."""
        shard = self._infos[name].shard
        self.prefetch(shard)
        return self._shards[shard].result().read(name, start, stop)

    def release(self, shard: str) -> None:
        """See `TensorSource`."""
        with self._lock:
            future = self._shards.pop(shard, None)
        if future is None or not future.done() or future.exception() is not None:
            return
        source = future.result()
        source.release(shard)
        if self._scratch is not None and source.folder == self._scratch:
            (source.folder / shard).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop what is on its way, and whoever waits for it; what is there can be resumed."""
        with self._lock:
            self._stopped.set()
            waiting = list(self._shards.values())
        self._wanted.put(None)
        for future in waiting:
            _settle(future, error=Stopped())
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)

    def discard(self) -> None:
        """Delete the scratch folder."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _work(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="glmquant-check") as checker:
            while (shard := self._wanted.get()) is not None:
                future = self._shards.get(shard)
                if future is None:  # released before it came
                    continue
                count = self._counter(shard)
                try:
                    folder, path = self._fetched(shard, count)
                except BaseException as error:
                    _settle(future, error=error)
                    if self._stopped.is_set():
                        return
                else:
                    checker.submit(self._check, future, shard, folder, path, count)

    def _counter(self, shard: str) -> OnBytes:
        size = self.repository.files[shard].size
        got = 0

        def count(nbytes: int) -> None:
            nonlocal got
            if self._stopped.is_set():
                raise Stopped
            got += nbytes
            if self.on_shard is not None:
                self.on_shard(shard, got, size)

        return count

    def _fetched(self, shard: str, count: OnBytes) -> tuple[Path | None, Path]:
        """The folder to keep a shard in, and where it is now; None is the client's cache."""
        path = self.repository.cached(shard)
        if path is not None:
            return None, path
        if self._scratch is not None:
            self._scratch.mkdir(parents=True, exist_ok=True)
        return self._scratch, self.repository.fetch_unchecked(shard, self._scratch, count)

    def _check(
        self, future: Future[TensorSource], shard: str, folder: Path | None, path: Path, count: OnBytes
    ) -> None:
        try:
            _settle(future, self._opened(shard, self.repository.checked(shard, folder, path, count)))
        except BaseException as error:
            _settle(future, error=error)

    def _opened(self, shard: str, path: Path) -> TensorSource:
        source = open_shard(path.parents[shard.count("/")], shard)
        here = {name: (info.dtype, info.shape) for name, info in source.infos().items()}
        listed = {n: (i.dtype, i.shape) for n, i in self._infos.items() if i.shard == shard}
        if listed.items() - here.items():
            raise SourceError(
                f"{shard} of {self.repository.ref} holds other tensors than its header told before."
            )
        return source


def _settle(
    future: Future[TensorSource], source: TensorSource | None = None, error: BaseException | None = None
) -> None:
    """Give a future its outcome, unless it has one."""
    with suppress(InvalidStateError):
        if error is not None or source is None:
            future.set_exception(error)
        else:
            future.set_result(source)
