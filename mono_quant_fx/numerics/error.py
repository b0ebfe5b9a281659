"""How far a tensor is from its reference. Pure functions over tensors, and a running sum for data in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mono_quant_fx.errors import InputError


@dataclass
class ErrorSum:
    """Signal and noise energy summed over batches; every figure of a table row comes from one of these.

    Positions where both tensors hold the same infinity or NaN (attention masks) count as equal; a position where only
    one of them is finite makes the noise infinite.
    """

    signal: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0
    batches: int = 0

    def add(self, reference: Tensor, approximation: Tensor) -> None:
        """Adds one pair of equally shaped tensors (any floating dtype; sums are taken in float64).

        Differences are taken in float32, and in float64 where one of the two is.
        """
        is_double = torch.float64 in (reference.dtype, approximation.dtype)
        dtype = torch.float64 if is_double else torch.float32
        ref, diff = reference.detach().to(dtype), approximation.detach().to(dtype)
        diff = ref - diff
        self.batches += 1
        if not bool(torch.isfinite(diff.sum())):
            finite = torch.isfinite(ref)
            same = (reference == approximation) | (reference.isnan() & approximation.isnan())
            diff = torch.where(same & ~finite, 0.0, diff)
            ref = torch.where(finite, ref, 0.0)
            if not bool(torch.isfinite(diff).all()):
                self.noise = self.max_abs = math.inf
        self.signal += _energy(ref)
        if math.isfinite(self.noise) and diff.numel():
            self.noise += _energy(diff)
            self.max_abs = max(self.max_abs, float(diff.abs().amax()))

    def merge(self, later: ErrorSum) -> None:
        """Adds what another sum has of the pairs that come after."""
        self.signal += later.signal
        self.noise += later.noise
        self.max_abs = max(self.max_abs, later.max_abs)
        self.batches += later.batches

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise): inf for equal tensors, None before any data."""
        if self.batches == 0:
            return None
        if self.noise == 0.0:
            return math.inf
        if self.signal == 0.0 or math.isinf(self.noise):
            return -math.inf
        return 10.0 * math.log10(self.signal / self.noise)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB: 10 log10(sum ref^2 / sum (ref - x)^2).

    >>> round(sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 2)
    20.0
    """
    return _summed(reference, approximation).sqnr_db or 0.0


def max_abs_error(reference: Tensor, approximation: Tensor) -> float:
    """The largest |ref - x|.

    >>> max_abs_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    0.5
    """
    return _summed(reference, approximation).max_abs


def relative_error(reference: Tensor, approximation: Tensor) -> float:
    """||ref - x|| / ||ref||: 0 for equal tensors, inf for a zero reference that is missed.

    >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    0.1
    """
    total = _summed(reference, approximation)
    if total.noise == 0.0:
        return 0.0
    return math.sqrt(total.noise / total.signal) if total.signal else math.inf


def _summed(reference: Tensor, approximation: Tensor) -> ErrorSum:
    for value in (reference, approximation):
        if not isinstance(value, Tensor):
            raise InputError(f"two tensors of one shape are needed, not {type(value).__name__}")
    if reference.shape != approximation.shape:
        raise InputError(f"shapes differ: {tuple(reference.shape)} and {tuple(approximation.shape)}")
    total = ErrorSum()
    total.add(reference, approximation)
    return total


def _energy(x: Tensor) -> float:
    # float64 sums a row at a time, so that the scratch stays small beside x
    flat = x.reshape(-1)
    return sum(float(part.double().square().sum()) for part in flat.split(1 << 17))
