"""Blocks of one job on several threads, each with one core: for work that is many small tensor ops."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
Block = tuple[int, int]


class Workers:
    """As many threads as torch would use. Inside, torch uses one: starting several for each small op costs more."""

    def __enter__(self) -> Workers:
        self._count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._count)  # what a thread sets is also what later threads start with

    def run(self, work: Callable[[int, int], T], blocks: Sequence[Block]) -> Iterator[tuple[int, T]]:
        """(stop, work(start, stop)) of each block in turn; one block more than there are threads is under way."""
        waiting: deque[tuple[int, Future[T]]] = deque()
        for start, stop in blocks:
            waiting.append((stop, self._pool.submit(work, start, stop)))
            if len(waiting) > self._count:
                end, future = waiting.popleft()
                yield end, future.result()
        while waiting:
            end, future = waiting.popleft()
            yield end, future.result()
