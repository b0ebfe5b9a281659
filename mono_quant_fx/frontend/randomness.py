"""Random numbers that a trace would freeze: drawn once, while the model's code runs, and the same ever after."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mono_quant_fx.errors import CaptureError

#: What is said of numbers that torch did not draw.
NOT_TORCHS = (
    "forward draws from Python's or numpy's generator, and a graph would keep the numbers that it got this time; draw "
    "with torch.rand and its like instead"
)


class FrozenRandomnessError(CaptureError):
    """A call drew random numbers that tracing cannot keep random; the message names it."""


class Draws(TorchDispatchMode):
    """Sees which ops on real tensors draw from torch's generators. A call on a Proxy is none: it is recorded.

    Args:
        is_raising: stop at the first, so that the traceback shows the line that draws.
    """

    def __init__(self, is_raising: bool):
        super().__init__()
        self.is_raising, self.found = is_raising, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.found = True
            if self.is_raising:
                name = str(func).rpartition(".")[0]
                raise FrozenRandomnessError(f"{name} draws random numbers, and a graph would repeat them for ever")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def own_generators(seed: int | None = None) -> Iterator[None]:
    """Puts every global generator (torch, random, numpy) back as it was; with a seed, all begin there meanwhile."""
    before = _states()
    try:
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(seed)
        yield
    finally:
        torch.set_rng_state(before[0])
        if before[1] is not None:
            torch.cuda.set_rng_state_all(before[1])
        random.setstate(before[2])
        if before[3] is not None:
            sys.modules["numpy"].random.set_state(before[3])


class OtherDraws:
    """Whether Python's or numpy's generator moved since this was made; other threads move them too."""

    def __init__(self) -> None:
        self.before = _states()[2:]

    @property
    def found(self) -> bool:
        """True if one did."""
        now = _states()[2:]
        return now[0] != self.before[0] or str(now[1]) != str(self.before[1])


@contextlib.contextmanager
def nothing_else_drawn() -> Iterator[None]:
    """Raises FrozenRandomnessError at the end if Python's or numpy's generator moved."""
    others = OtherDraws()
    yield
    if others.found:
        raise FrozenRandomnessError(NOT_TORCHS)


def _states() -> tuple[torch.Tensor, list[torch.Tensor] | None, Any, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    return torch.get_rng_state(), cuda, random.getstate(), numpy
