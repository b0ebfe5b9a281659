"""Random ops in two versions of a graph: both draw the same numbers, so that their difference is not that of noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Noise:
    """Where the generator stood before each random step of the first version, for the second to start from."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}

    def first(self, name: str, work: Callable[[], T]) -> T:
        """Runs the step, and keeps where the generator stood if it drew anything."""
        state = torch.get_rng_state()
        value = work()
        if not torch.equal(state, torch.get_rng_state()):
            self.before[name] = state
        return value

    def again(self, name: str, work: Callable[[], T]) -> T:
        """Runs the step of that name again, on the same numbers; afterwards the generator stands where it stood."""
        state = self.before.get(name)
        if state is None:
            return work()
        now = torch.get_rng_state()
        torch.set_rng_state(state)
        try:
            return work()
        finally:
            torch.set_rng_state(now)


def alike(*works: Callable[[], T]) -> list[T]:
    """What each gives when it starts where the generator stands; nothing is left of what they draw."""
    noise = Noise()
    with torch.random.fork_rng(devices=[]):
        first, *rest = works
        return [noise.first("", first), *(noise.again("", work) for work in rest)]
