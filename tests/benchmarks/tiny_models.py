"""Two tiny models with random weights for the accuracy benchmark's --quick: how often does the float answer stay?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

EVALUATED, BATCH = 256, 8
SEED = 0


@dataclass(frozen=True)
class Tiny:
    """A model with the names of tests/real_models; inputs are normal, labels are the float model's own answers."""

    NAME: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    METRIC: str = "same answer"
    HIGHER_IS_BETTER: bool = True
    NUM_SAMPLES: int = 16

    def load(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return self.make().eval()

    def calibration(self) -> list[tuple[Tensor, ...]]:
        return [(x,) for x in self._inputs(SEED + 1, self.NUM_SAMPLES).split(BATCH)]

    def unseen(self) -> list[tuple[Tensor, ...]]:
        return [(x,) for x in self._inputs(SEED + 3, self.NUM_SAMPLES).split(BATCH)]

    def evaluate(self, model: nn.Module) -> tuple[float, float | None]:
        inputs = self._inputs(SEED + 2, EVALUATED)
        with torch.no_grad():
            same = float((model(inputs).argmax(-1) == self.load()(inputs).argmax(-1)).float().mean())
        return same, (same * (1 - same) / EVALUATED) ** 0.5

    @cache  # noqa: B019
    def _inputs(self, seed: int, count: int) -> Tensor:
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(seed))


TINY_MLP = Tiny("tiny MLP", lambda: nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 16)), (128,))
TINY_CONV = Tiny(
    "tiny conv net",
    lambda: nn.Sequential(
        nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16)
    ),
    (8, 6, 6),
)
