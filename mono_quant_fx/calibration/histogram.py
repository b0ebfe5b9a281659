"""Observers that keep a histogram, and cut the range where it costs little: by KL divergence, or at a percentile.

The bins are [k w, (k + 1) w) for integer k, with w the smallest power of two for which a row of `bins` of them holds
zero and everything seen. So w and the first k follow from the extremes alone, and when the range grows, whole bins
merge into whole bins. Exact: the counts, bit for bit, for any split of the data into batches, any order and any merge.
Not exact: where inside its bin a value lies; w is at most 2 / (bins - 2) of the range, widened to hold zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from mono_quant_fx.calibration.kl_divergence import kl_bounds
from mono_quant_fx.calibration.observer import MinMaxObserver, numbers, tiles
from mono_quant_fx.errors import ConfigError

#: log2 of the narrowest bin: the smallest float32, so that an all-zero tensor has a grid too.
FINEST = -149


class HistogramObserver(MinMaxObserver):
    """A histogram of everything seen, and the range that minimizes the KL divergence of quantizing it.

    Args:
        axis: as for every observer; one histogram a channel.
        bins: how many; the cut never goes below one bin for each code (half the codes for |x| when symmetric), that is
            1/16 to 1/4 of the range with 2048 bins and 8 bits, and an outlier further out needs more bins.
        max_cut: the percentage of the values other than zero that may lie outside the range, at least one of them.

    The divergence knows no distances. Without max_cut it draws the range in wherever most values are small: of an
    activation that ends in a ReLU6, it cut 10% at half the range, and the SQNR of the tensor fell by 30 dB.
    Values that are exactly zero do not take part in the divergence: zero always has a code, and the spike that a ReLU
    leaves there would draw the range in. The count of each bin is exact for any split (see the module's docstring).

    >>> observer = HistogramObserver(bins=16)
    >>> _ = observer(torch.tensor([0.0, 1.0])), observer(torch.tensor([-2.5, 5.5]))
    >>> observer.width.item(), observer.counts.tolist()
    (1.0, [1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    """

    name = "histogram"
    counts: Tensor
    exponent: Tensor
    origin: Tensor
    zeros: Tensor

    def __init__(self, axis: int | None = None, *, bins: int = 2048, max_cut: float = 0.01):
        super().__init__(axis)
        if isinstance(bins, bool) or not isinstance(bins, int) or not 2 <= bins <= 1 << 16:
            raise ConfigError(f"bins={bins!r}: a whole number from 2 to {1 << 16} is needed; 2048 is usual")
        if isinstance(max_cut, bool) or not isinstance(max_cut, int | float) or not 0 <= max_cut <= 100:
            raise ConfigError(f"max_cut={max_cut!r}: a percentage in [0, 100] is needed; 0.01 is usual")
        self.bins, self.max_cut = bins, max_cut

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.register_buffer("counts", self.count.new_zeros(0))  # [bins], or [C, bins]
        for name in ("exponent", "origin", "zeros"):  # log2 of w; the first k; values that are exactly zero
            self.register_buffer(name, torch.zeros_like(self.count))

    @property
    def width(self) -> Tensor:
        """The width of a bin, float64."""
        return _power_of_two(self.exponent)

    def observe(self, rows: Tensor) -> None:
        """Widens the grid if it must, and counts."""
        super().observe(rows)
        counts, exponent, origin = self._regrid()
        offset = (torch.arange(len(rows), device=rows.device) * self.bins - origin)[:, None]
        scale = _power_of_two(-exponent)[:, None]
        flat, zeros = counts.flatten(), torch.zeros_like(origin)
        for tile in tiles(rows):
            index = (tile.double() * scale).floor_().long().add_(offset)  # exact: float64 holds the product
            flat = flat + torch.bincount(index.flatten(), minlength=counts.numel())
            zeros = zeros + (tile == 0).sum(1)
        self._store(flat.view_as(counts), exponent, origin)
        self.zeros = self.zeros + self._one_or_each(zeros)

    def merge_state(self, other: Any) -> None:
        """The grid that holds both, and the sum of the counts."""
        super().merge_state(other)
        counts, exponent, origin = self._regrid()
        theirs = _rebin(other.counts.reshape(-1, self.bins), other.exponent, other.origin, exponent, origin)
        self._store(counts + theirs, exponent, origin)
        self.zeros = self.zeros + other.zeros

    def value_range(self, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """What kl_bounds keeps, per channel; the whole range where the histogram has fewer bins than codes."""

        def cut(counts: Tensor, origin: int, zeros: int) -> tuple[int, int]:
            counts = counts.clone()
            counts[-origin] -= zeros
            most = math.ceil(Fraction(str(self.max_cut)) / 100 * int(counts.sum()))
            if symmetric:
                _, hi = kl_bounds(_folded(counts, origin), 1 << (bits - 1), 0, most)
                return -hi, hi
            lo, hi = kl_bounds(counts, 1 << bits, -origin, most)
            return lo + origin, hi + origin

        return self._range(cut, symmetric)

    def statistics(self) -> dict[str, tuple[float, ...]]:
        """min, max, count, and from the bins' centers: skew, kurtosis (a normal has 3), outlier_ratio.

        outlier_ratio is max|x| over the magnitude that 99.9% of the values do not exceed; without data or spread these
        three are 0, 0 and 1.
        """
        shape = [_shape(*channel) for channel in self._channels()] or [(0.0, 0.0, 1.0)]
        names = ("skew", "kurtosis", "outlier_ratio")
        moments = {name: tuple(s[i] for s in shape) for i, name in enumerate(names)}
        return {**super().statistics(), "count": numbers(self.count), **moments}

    def _channels(self) -> list[tuple[Tensor, int, int]]:
        """(counts [bins], origin, zeros) of each channel; nothing before any data."""
        if not bool(self.count.any()):
            return []
        origins, zeros = self.origin.reshape(-1).tolist(), self.zeros.reshape(-1).tolist()
        return list(zip(self.counts.reshape(-1, self.bins).cpu(), origins, zeros, strict=True))

    def _range(self, cut: Callable[[Tensor, int, int], tuple[int, int]], symmetric: bool) -> tuple[Tensor, Tensor]:
        """The edges of the bins that `cut` keeps, no further than the extremes."""
        channels = self._channels()
        if not channels:
            return self.min_val, self.max_val
        kept = torch.tensor([cut(*channel) for channel in channels], dtype=torch.float64, device=self.count.device)
        low, high = self._one_or_each(kept * self.width.reshape(-1, 1)).unbind(-1)
        reach = torch.maximum(self.max_val, -self.min_val)
        floor, ceiling = (-reach, reach) if symmetric else (self.min_val.clamp(max=0), self.max_val.clamp(min=0))
        return torch.maximum(low, floor.double()).float(), torch.minimum(high, ceiling.double()).float()

    def _regrid(self) -> tuple[Tensor, Tensor, Tensor]:
        """(counts [C, bins], exponent [C], origin [C]) on the grid of the present extremes."""
        low, high = self.min_val.reshape(-1), self.max_val.reshape(-1)
        exponent, origin = _grid(low.clamp(max=0.0).double(), high.clamp(min=0.0).double(), self.bins)
        if not self.counts.numel():
            return self.counts.new_zeros(len(low), self.bins), exponent, origin
        old = self.counts.reshape(-1, self.bins)
        return _rebin(old, self.exponent, self.origin, exponent, origin), exponent, origin

    def _store(self, counts: Tensor, exponent: Tensor, origin: Tensor) -> None:
        self.counts, self.exponent, self.origin = (self._one_or_each(t) for t in (counts, exponent, origin))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}counts")
        if saved is not None and saved.shape[-1] not in (0, self.bins):
            args[-1].append(f"{prefix}counts: the saved state has {saved.shape[-1]} bins, this observer {self.bins}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class PercentileObserver(HistogramObserver):
    """The range that holds `percentile` % of the values.

    Symmetric: of |x|. Asymmetric: of x, with half of the rest cut at each end.
    The number of values cut is exact and at most (100 - percentile) %; an end lies within one bin beyond the last value
    kept, and on it when nothing is cut.

    >>> observer = PercentileObserver(percentile=90)
    >>> _ = observer(torch.arange(1.0, 101.0))
    >>> observer.value_range(symmetric=True)
    (tensor(-90.0625), tensor(90.0625))
    """

    name = "percentile"

    def __init__(self, axis: int | None = None, *, percentile: float = 99.99, bins: int = 2048):
        super().__init__(axis, bins=bins)
        if isinstance(percentile, bool) or not isinstance(percentile, int | float) or not 0 < percentile <= 100:
            raise ConfigError(f"percentile={percentile!r}: a number in (0, 100] is needed; 99.99 is usual")
        self.percentile = percentile

    def value_range(self, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """The percentiles."""
        rest = (100 - Fraction(str(self.percentile))) / 100  # exact, so that 99.9 % of 1000 values cuts one

        def cut(counts: Tensor, origin: int, zeros: int) -> tuple[int, int]:
            if symmetric:
                hi = _upper(_folded(counts, origin), rest)
                return -hi, hi
            hi = _upper(counts, rest / 2)
            lo = len(counts) - _upper(counts.flip(0), rest / 2)
            return min(lo + origin, 0), max(hi + origin, 0)

        return self._range(cut, symmetric)


def _grid(low: Tensor, high: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Exponent and origin, int64 [C], of the finest grid that holds [low, high], float64 [C], in `bins` bins."""
    start = torch.frexp((high - low) / bins).exponent.long() - 1  # no finer one does
    exponent = torch.where(high > low, start, FINEST).clamp(min=FINEST)
    while True:
        scale = _power_of_two(-exponent)
        first, last = (low * scale).floor().long(), (high * scale).floor().long()
        narrow = last - first >= bins
        if not bool(narrow.any()):
            return exponent, first
        exponent = exponent + narrow


def _rebin(counts: Tensor, exponent: Tensor, origin: Tensor, to_exponent: Tensor, to_origin: Tensor) -> Tensor:
    """Counts [C, bins] of one grid on a coarser one: bin k becomes bin floor(k / 2^growth), without loss."""
    bins = counts.shape[1]
    growth = (to_exponent - exponent.reshape(-1)).clamp(max=62)[:, None]
    index = (origin.reshape(-1, 1) + torch.arange(bins, device=counts.device)) >> growth
    index = (index - to_origin[:, None]).clamp(0, bins - 1)  # only empty bins lie outside
    return torch.zeros_like(counts).scatter_add(1, index, counts)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, exact (a vectorized pow need not be): the bits of a double."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _folded(counts: Tensor, origin: int) -> Tensor:
    """The histogram of |x|: bin -k - 1 is laid on bin k."""
    negative, positive = counts[:-origin].flip(0) if origin else counts[:0], counts[-origin:]
    size = max(len(negative), len(positive))
    pad = torch.nn.functional.pad
    return pad(negative, (0, size - len(negative))) + pad(positive, (0, size - len(positive)))


def _upper(counts: Tensor, rest: Fraction) -> int:
    """Bins to keep from the start so that at most the share `rest` of the counts lies behind them."""
    total = int(counts.sum())
    keep = total - int(total * rest)
    return int(torch.searchsorted(counts.cumsum(0), max(keep, 1))) + 1


def _shape(counts: Tensor, origin: int, zeros: int) -> tuple[float, float, float]:
    """Skew, kurtosis and outlier ratio; in units of the bin width, which cancels."""
    k = torch.arange(len(counts)) + origin
    at, weight = torch.cat([k + 0.5, torch.zeros(1)]).double(), torch.cat([counts, counts.new_tensor([zeros])]).double()
    weight[-origin] -= zeros  # exact zeros lie at 0, not at the center of their bin
    folded = _folded(counts, origin)
    ratio = (int(folded.nonzero()[-1]) + 1) / _upper(folded, Fraction(1, 1000))
    weight = weight / weight.sum()
    centered = at - (at * weight).sum()
    variance = float((centered**2 * weight).sum())
    if not variance > 0:
        return 0.0, 0.0, ratio
    return (
        float((centered**3 * weight).sum()) / variance**1.5,
        float((centered**4 * weight).sum()) / variance**2,
        ratio,
    )
