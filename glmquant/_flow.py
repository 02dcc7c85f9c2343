"""The order of the work: tasks over threads, and shards of the source that come and go beside them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from .checkpoint.source import TensorSource

if TYPE_CHECKING:
    from ._quantize import Task, TaskResult


class SourceShards:
    """Tells the source which shards come next and which are done with."""

    def __init__(self, source: TensorSource, todo: list[Task], before_release: Callable[[], None]) -> None:
        self._source, self._before_release = source, before_release
        infos = source.infos()
        self._shard = {task.item.source: infos[task.item.source].shard for task in todo}
        self._left = Counter(self._shard[task.item.source] for task in todo)
        self._ahead = deque(dict.fromkeys(self._shard[task.item.source] for task in todo))
        self._prefetch(2)

    def _prefetch(self, count: int) -> None:
        for _ in range(min(count, len(self._ahead))):
            self._source.prefetch(self._ahead.popleft())

    def done(self, task: Task) -> None:
        """One more task has been worked on."""
        shard = self._shard[task.item.source]
        self._left[shard] -= 1
        if not self._left[shard]:
            self._before_release()
            self._source.release(shard)
            self._prefetch(1)


def in_order(
    todo: Iterable[Task], workers: int, work: Callable[[Task], TaskResult], abandon: Callable[[], None]
) -> Iterator[tuple[Task, TaskResult]]:
    """Results of `work` in the order of `todo`, a few tasks ahead of the caller; without threads for one worker.

    `abandon` is called if it ends early: workers may be waiting for what will not be needed.
    """
    if workers == 1:
        for task in todo:
            yield task, work(task)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="glmquant-work") as pool:
        ahead: deque[tuple[Task, Future[TaskResult]]] = deque()
        try:
            for task in todo:
                ahead.append((task, pool.submit(work, task)))
                if len(ahead) > 2 * workers:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        except BaseException:
            abandon()
            raise
        finally:
            for _, future in ahead:
                future.cancel()
