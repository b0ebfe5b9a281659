"""What a normally distributed weight, as trained ones are, loses to a scheme: the measure of what is unusual."""

from __future__ import annotations

import functools

import torch

from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine
from mono_quant_fx.numerics.error import sqnr_db

#: Weights that are drawn, and the longest row: past it, longer rows change tenths of a dB.
DRAWN, LONGEST = 1 << 18, 1 << 16


def normal_sqnr_db(scheme: QuantScheme, columns: int) -> float:
    """The SQNR of normal weights rounded to nearest, in rows of so many columns.

    >>> [round(normal_sqnr_db(QuantScheme(4, size), 4096)) for size in (32, 128, -1)]
    [20, 19, 17]
    """
    size = columns if scheme.group_size == -1 else scheme.group_size
    return _drawn(scheme.bits, scheme.symmetric, min(size, LONGEST))


@functools.cache
def _drawn(bits: int, symmetric: bool, columns: int) -> float:
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (max(1, DRAWN // columns), columns)
    weight = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return sqnr_db(weight, affine.fake_quantize(weight, QuantScheme(bits, -1, symmetric)))
