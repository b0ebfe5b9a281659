"""Blocks of one job on several threads, each with one core: for work that is many small tensor ops."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

A = TypeVar("A")
T = TypeVar("T")


class Workers:
    """As many threads as torch would use. Inside, torch uses one: starting several for each small op costs more."""

    def __enter__(self) -> Workers:
        self._count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._count)  # what a thread sets is also what later threads start with

    def run(self, work: Callable[[A], T], items: Iterable[A]) -> Iterator[tuple[A, T]]:
        """(item, work(item)) of each in turn; one item more than there are threads is under way."""
        waiting: deque[tuple[A, Future[T]]] = deque()
        for item in items:
            waiting.append((item, self._pool.submit(work, item)))
            if len(waiting) > self._count:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
