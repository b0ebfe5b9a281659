"""What became of a lowered weight, in a few figures: its scales, its zero points, and how its codes are used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mono_quant_fx.graph.annotation import QuantAnnotation, stored_weight
from mono_quant_fx.graph.weight_ops import matrix_shape
from mono_quant_fx.numerics import affine


@dataclass(frozen=True)
class CodeSummary:
    """The figures of one stored weight.

    Attributes:
        rows, groups: N and G, so that there are N * G scales.
        scales: the smallest, the median (the lower one of two) and the largest scale.
        zero_points: the smallest and the largest; None when symmetric.
        code_range: qmin and qmax.
        counts: how many weights have each code, from qmin to qmax.
    """

    rows: int
    groups: int
    scales: tuple[float, float, float]
    zero_points: tuple[int, int] | None
    code_range: tuple[int, int]
    counts: tuple[int, ...]

    @property
    def used(self) -> int:
        """How many of the codes at least one weight has."""
        return sum(count > 0 for count in self.counts)

    @property
    def saturated(self) -> int:
        """How many weights have the smallest or the largest code."""
        return self.counts[0] + self.counts[-1]

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return sum(self.counts)


def summarize(gm: fx.GraphModule, annotation: QuantAnnotation) -> CodeSummary:
    """Reads the stored tensors of a lowered weight, a tile of rows at a time."""
    assert annotation.scheme is not None
    packed, scale, zero_point = stored_weight(gm, annotation)
    columns = matrix_shape(annotation.shape, annotation.layout, annotation.groups)[1]
    low, high = affine.code_range(annotation.scheme.bits)
    counts = torch.zeros(high - low + 1, dtype=torch.int64)
    step = max(1, affine.TILE // max(1, columns))
    for start in range(0, len(packed), step):
        counts += _counted(packed[start : start + step], columns, low, len(counts))
    wide = scale.detach().double().flatten()
    zeros = None if zero_point is None else (int(zero_point.min()), int(zero_point.max()))
    scales = (float(wide.min()), float(wide.median()), float(wide.max()))
    return CodeSummary(scale.shape[0], scale.shape[1], scales, zeros, (low, high), tuple(counts.tolist()))


def _counted(packed: Tensor, columns: int, low: int, codes: int) -> Tensor:
    q = packed if packed.dtype == torch.int8 else affine.unpack_int4(packed, columns)
    return torch.bincount(q.flatten().int() - low, minlength=codes).cpu()
