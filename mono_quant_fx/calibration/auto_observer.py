"""Which observer suits a tensor. EXPERIMENTAL: the rules and limits come from synthetic tensors and will change."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from mono_quant_fx.calibration.histogram import HistogramObserver, PercentileObserver
from mono_quant_fx.calibration.observer import MinMaxObserver
from mono_quant_fx.errors import ConfigError

#: Fewer values than this say little about a tail: 99.99 % would cut less than one of them.
FEW_VALUES = 10_000
#: max|x| over the 99.9 % magnitude; a normal tensor of 10^5 values has 1.4.
SHORT_TAIL, LONG_TAIL = 1.5, 4.0
#: A normal has kurtosis 3, a Laplace 6; a normal has skew 0, an exponential 2.
HEAVY_KURTOSIS, STRONG_SKEW = 30.0, 3.0

NEEDED = ("count", "skew", "kurtosis", "outlier_ratio")


class ExperimentalWarning(UserWarning):
    """What warned may change, or go, without notice."""


def select_observer(
    statistics: Mapping[str, float | tuple[float, ...]] | HistogramObserver | Tensor,
) -> tuple[str, str]:
    """(name for create_observer, reason in one line) for a tensor of which these statistics are known. EXPERIMENTAL.

    Args:
        statistics: a HistogramObserver, its statistics(), or a tensor of samples. Of several channels the most extreme
            one decides. minmax, histogram and percentile are the candidates.

    Raises:
        ConfigError: a statistic is missing.
        CalibrationError: the samples hold NaN or infinity.

    Warns:
        ExperimentalWarning: once a process.

    >>> warnings.simplefilter("ignore", ExperimentalWarning)
    >>> select_observer({"count": 1e6, "skew": 0.0, "kurtosis": 6.0, "outlier_ratio": 1.9})
    ('histogram', 'experimental: a moderate tail: max|x| is 1.9 times the 99.9% magnitude, kurtosis 6.0, skew 0.0')
    """
    _warn_once()
    if isinstance(statistics, Tensor):
        samples, statistics = statistics, HistogramObserver()
        statistics(samples)
    known = statistics.statistics() if isinstance(statistics, HistogramObserver) else statistics
    count, skew, kurtosis, ratio = (_most_extreme(known, name) for name in NEEDED)
    name, words = _decide(count, skew, kurtosis, ratio)
    return name, f"experimental: {words}"


def _decide(count: float, skew: float, kurtosis: float, ratio: float) -> tuple[str, str]:
    if count < FEW_VALUES:
        return "minmax", f"{count:,.0f} values say little about the tail; {FEW_VALUES:,} would"
    far = f"max|x| is {ratio:.1f} times the 99.9% magnitude"
    if ratio <= SHORT_TAIL:
        return "minmax", f"no tail to cut: {far}"
    if ratio > LONG_TAIL:
        return "percentile", f"isolated outliers: {far}"
    if abs(skew) > STRONG_SKEW:
        return "percentile", f"one long side: skew {skew:.1f}, where KL divergence would cut into it"
    if kurtosis > HEAVY_KURTOSIS:
        return "percentile", f"a heavy tail: kurtosis {kurtosis:.1f}, where KL divergence would cut into it"
    return "histogram", f"a moderate tail: {far}, kurtosis {kurtosis:.1f}, skew {round(skew, 1) + 0.0:.1f}"


def _most_extreme(statistics: Mapping[str, float | tuple[float, ...]], name: str) -> float:
    if name not in statistics:
        raise ConfigError(
            f"select_observer: {name!r} is missing; a HistogramObserver's statistics() have {', '.join(NEEDED)}"
        )
    values = torch.as_tensor(statistics[name], dtype=torch.float64).reshape(-1)
    return float(values[values.abs().argmax()]) if len(values) else 0.0


class AutoObserver(PercentileObserver):
    """A histogram, and at the end the range of the kind that select_observer picks for it. EXPERIMENTAL.

    Takes the options of PercentileObserver.

    >>> warnings.simplefilter("ignore", ExperimentalWarning)
    >>> observer = AutoObserver()
    >>> _ = observer(torch.linspace(-1, 1, 20_000))
    >>> observer.chosen()[0], observer.value_range()
    ('minmax', (tensor(-1.), tensor(1.)))
    """

    name = "auto"

    def chosen(self) -> tuple[str, str]:
        """What select_observer says to the statistics so far."""
        return select_observer(self)

    def value_range(self, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """The range as the chosen kind would give it."""
        kinds = {kind.name: kind for kind in (MinMaxObserver, HistogramObserver, PercentileObserver)}
        return kinds[self.chosen()[0]].value_range(self, bits, symmetric)


@functools.cache  # once a process, unless the warning is turned into an error
def _warn_once() -> None:
    warnings.warn("select_observer is experimental: its rules will change", ExperimentalWarning, stacklevel=3)
