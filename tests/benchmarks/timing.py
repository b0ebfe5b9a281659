"""Times of things that are compared: in turns, in one process, and the median of many."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

#: What is timed; it gets the number of the call, so that it can take another weight each time.
Run = Callable[[int], object]
#: Seconds between turns: worker threads of the last one stop spinning for work.
PAUSE = 0.002
#: Seconds of a turn, at least one call.
TURN = 0.008
#: Calls that each run gets in any case, and calls beyond which more tell nothing.
LEAST, MOST = 3, 1000


class Turns:
    """The calls of one run and their times."""

    def __init__(self, run: Run, share: float):
        self.run, self.share = run, share
        self.taken: list[float] = []
        self.calls = 0

    @property
    def is_done(self) -> bool:
        """Whether it has had its share of the time, and enough calls."""
        return len(self.taken) >= MOST or (len(self.taken) >= LEAST and sum(self.taken) >= self.share)

    def turn(self) -> None:
        """Calls for TURN seconds; the first call of a quick run warms up and is not counted."""
        time.sleep(PAUSE)
        if not self.taken or self.taken[-1] < TURN:
            self._call()
        end = time.perf_counter() + TURN
        while True:
            self.taken.append(self._call())
            if time.perf_counter() >= end:
                return

    def _call(self) -> float:
        start = time.perf_counter()
        self.run(self.calls)
        self.calls += 1
        return time.perf_counter() - start


def medians(runs: Mapping[str, Run], seconds: float) -> dict[str, float]:
    """Name -> median seconds a call, of calls in turns; `seconds` are shared evenly, and slow runs get LEAST calls."""
    turns = {name: Turns(run, seconds / len(runs)) for name, run in runs.items()}
    while left := [t for t in turns.values() if not t.is_done]:
        for each in left:
            each.turn()
    return {name: statistics.median(each.taken) for name, each in turns.items()}
