"""The observers by name, and those that keep an average: of each batch's range, or of each channel's energy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mono_quant_fx.calibration.auto_observer import AutoObserver
from mono_quant_fx.calibration.histogram import HistogramObserver, PercentileObserver
from mono_quant_fx.calibration.observer import MinMaxObserver, Observer, known_options, numbers, tiles
from mono_quant_fx.errors import ConfigError

__all__ = [
    "HistogramObserver",
    "InputEnergyObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "PercentileObserver",
    "create_observer",
]


class MovingAverageMinMaxObserver(MinMaxObserver):
    """An exponential moving average of the batches' min and max; the first batch starts it.

        min <- (1 - c) min + c min(batch)          c = averaging_constant

    It depends on how the data is split into batches: that is its purpose. merge(other) continues with the batches of
    `other`, exactly (up to rounding), for which the first batch is kept: with n of them, decay d = (1 - c)^n,

        merged = other + d (self - first batch of other)

    >>> observer = MovingAverageMinMaxObserver(averaging_constant=0.5)
    >>> _ = observer(torch.tensor([0.0, 1.0])), observer(torch.tensor([0.0, 3.0]))
    >>> observer.statistics()["max"]
    (2.0,)
    """

    name = "moving_average_minmax"
    batches: Tensor
    first_min: Tensor
    first_max: Tensor

    def __init__(self, axis: int | None = None, *, averaging_constant: float = 0.01):
        super().__init__(axis)
        if isinstance(averaging_constant, bool) or not isinstance(averaging_constant, int | float):
            raise ConfigError(f"averaging_constant={averaging_constant!r}: a number in (0, 1] is needed")
        if not 0 < averaging_constant <= 1:
            raise ConfigError(
                f"averaging_constant={averaging_constant!r}: it must lie in (0, 1]; 1 keeps the last batch"
            )
        self.averaging_constant = averaging_constant

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.register_buffer("batches", torch.zeros_like(self.count))
        self.register_buffer("first_min", self.min_val)
        self.register_buffer("first_max", self.max_val)

    def observe(self, rows: Tensor) -> None:
        """One step of the average, computed in float64."""
        low, high = (self._one_or_each(v) for v in torch.aminmax(rows, dim=1))
        if not bool(self.batches):
            self.min_val = self.first_min = low
            self.max_val = self.first_max = high
        else:
            c = self.averaging_constant
            self.min_val = ((1 - c) * self.min_val.double() + c * low.double()).float()
            self.max_val = ((1 - c) * self.max_val.double() + c * high.double()).float()
        self.batches = self.batches + 1

    def merge_state(self, other: Any) -> None:
        """Continues with the batches of `other`."""
        decay = (1 - self.averaging_constant) ** int(other.batches)
        self.min_val = (other.min_val + decay * (self.min_val.double() - other.first_min)).float()
        self.max_val = (other.max_val + decay * (self.max_val.double() - other.first_max)).float()
        self.batches = self.batches + other.batches

    def statistics(self) -> dict[str, tuple[float, ...]]:
        """The averages of min and max, and the number of batches."""
        return {**super().statistics(), "batches": numbers(self.batches)}


class InputEnergyObserver(Observer):
    """E[x^2] of each input channel (the last dimension unless `axis` says otherwise): what clip search weighs by.

    Summed in float64: exact for any split into batches up to that rounding. It measures no range.

    >>> observer = InputEnergyObserver()
    >>> _ = observer(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> observer.energy
    tensor([5., 2.])
    """

    name = "energy"
    sum_of_squares: Tensor

    def __init__(self, axis: int | None = -1):
        super().__init__(axis)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.register_buffer("sum_of_squares", self.count.new_zeros((), dtype=torch.float64))

    def observe(self, rows: Tensor) -> None:
        """Adds the squares."""
        added = sum(tile.double().square().sum(1) for tile in tiles(rows))
        self.sum_of_squares = self.sum_of_squares + self._one_or_each(torch.as_tensor(added))

    def merge_state(self, other: Any) -> None:
        """Adds the sums."""
        self.sum_of_squares = self.sum_of_squares + other.sum_of_squares

    @property
    def energy(self) -> Tensor:
        """E[x^2], float32; zero before any data."""
        return (self.sum_of_squares / self.count.clamp(min=1)).float()

    def value_range(self, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """Not measured.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "calculate_qparams: an energy observer measures no range; use minmax or histogram for qparams"
        )

    def statistics(self) -> dict[str, tuple[float, ...]]:
        """energy."""
        return {"energy": numbers(self.energy)}


_KINDS: tuple[type[Observer], ...] = (
    MinMaxObserver, MovingAverageMinMaxObserver, HistogramObserver, PercentileObserver, InputEnergyObserver,
    AutoObserver,
)  # fmt: skip


def create_observer(name: str = "minmax", **options: Any) -> Observer:
    """An observer by name: minmax, moving_average_minmax, histogram, percentile, energy, auto (experimental).

    Raises:
        ConfigError: an unknown name or option (lists the known ones), or a value that breaks a rule.

    >>> create_observer("minmax", axis=0)
    MinMaxObserver(axis=0, min=inf, max=-inf)
    """
    known = {kind.name: kind for kind in _KINDS}
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"observer {name!r} is not known; known: {', '.join(known)}")
    takes = known_options(known[name])
    for option in options:
        if option not in takes:
            raise ConfigError(f"observer {name!r} does not take {option!r}; it takes: {', '.join(takes)}")
    return known[name](**options)
