"""Refinement of a rounded weight: coordinate descent on everything that is stored, under the full Hessian.

With e = w - q the error of a row, its share of the layer's output error is e H e^T. In any one code, one scale or one
zero point, all others held, this is a parabola, and its least admissible value is known in closed form. One sweep
visits the groups in storage order and sets

    each code        q_j <- round to grid of q_j + (e H)_j / H_jj                  (QuantEase, arXiv 2309.01885, sec. 3)
    the scale        s <- s + c (e H)_g / (c H_gg c^T)          c = codes - zero_point, a row over the group's columns g
    the zero point   z <- round(z - 1 (e H)_g / (s 1 H_gg 1^T))                                     when asymmetric

(the last two follow from the parabola's zero derivative in the same way). No step lets the error grow. H e^T is kept up
to date: inside a group by a rank-one update a code, elsewhere by one product a group, so a sweep costs what one walk of
GPTQ costs. Everything is held transposed, columns first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine
from mono_quant_fx.numerics.clip import usable
from mono_quant_fx.numerics.gptq import Codes, best_rows

#: Sweeps over all columns. Measured: the first gains 0.1 dB, the second half as much, a third next to nothing.
SWEEPS = 2


def refine(
    weight: Tensor, hessian: Tensor, scheme: QuantScheme, codes: Tensor, scale: Tensor, zero_point: Tensor | None
) -> Codes:
    """Codes, scale and zero point, shaped and typed as given, of no larger error (w - q) H (w - q)^T in any row.

    Args:
        weight: float [N, K].
        hessian: H, float [K, K], symmetric and positive semidefinite (damped, to guard against chance correlations in
            few samples).
        scheme: bits, group size, symmetry.
        codes: int8 [N, K]; scale: [N, G] in the dtype it is stored in; zero_point: int8 [N, G], None when symmetric.
    """
    descent = _Descent.start(weight, hessian.float(), scheme, codes, scale, zero_point)
    size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    for _ in range(SWEEPS):
        for group, first in enumerate(range(0, weight.shape[1], size)):
            descent.visit(group, slice(first, first + size))
    return best_rows(weight, hessian, scheme, (codes, scale, zero_point), descent.result())


@dataclass
class _Descent:
    """What it holds: hessian [K, K], steps = codes - zero point [K, N], scale and zero [G, N], slope = H e^T [K, N]."""

    hessian: Tensor
    steps: Tensor
    scale: Tensor
    zero: Tensor
    slope: Tensor
    group: Tensor
    scheme: QuantScheme
    dtype: torch.dtype

    @classmethod
    def start(
        cls,
        weight: Tensor,
        hessian: Tensor,
        scheme: QuantScheme,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
    ) -> _Descent:
        columns = torch.arange(weight.shape[1], device=weight.device)
        group = columns // (weight.shape[1] if scheme.group_size == -1 else scheme.group_size)
        s = scale.float().t().clone(memory_format=torch.contiguous_format)  # never the caller's own tensor
        zero = torch.zeros_like(s) if zero_point is None else zero_point.float().t().contiguous()
        steps = codes.t().float().sub_(zero[group]).contiguous()
        slope = hessian @ (weight.float().t() - steps * s[group])
        return cls(hessian, steps, s, zero, slope, group, scheme, scale.dtype)

    def visit(self, group: int, columns: slice) -> None:
        """Sets the codes, the scale and the zero point of one group, and tells the other groups' slopes."""
        block, slope = self.hessian[columns, columns], self.slope[columns].clone()
        before = self.steps[columns] * self.scale[group]
        self._codes(group, columns, block, slope)
        self._scale(group, columns, block, slope)
        if not self.scheme.symmetric:
            self._zero_point(group, columns, block, slope)
        self.slope.addmm_(self.hessian[:, columns], self.steps[columns] * self.scale[group] - before, alpha=-1)

    def _codes(self, group: int, columns: slice, block: Tensor, slope: Tensor) -> None:
        steps, s, zero = self.steps[columns], self.scale[group], self.zero[group]
        qmin, qmax = affine.code_range(self.scheme.bits)
        low, high = qmin - zero, qmax - zero
        for j, curvature in enumerate(block.diagonal().tolist()):
            if curvature > 0.0:  # a column without data has no best code
                best = torch.addcdiv(steps[j], slope[j], s, value=1.0 / curvature).round_().clamp_(low, high)
                slope.addr_(block[:, j], (best - steps[j]).mul_(s), alpha=-1)
                steps[j] = best

    def _scale(self, group: int, columns: slice, block: Tensor, slope: Tensor) -> None:
        """A scale is rounded to its dtype; it moves only where that still brings it nearer to the parabola's bottom."""
        steps, s = self.steps[columns], self.scale[group]
        pull = block @ steps
        bottom = s + (steps * slope).sum(0) / (steps * pull).sum(0)
        best = bottom.to(self.dtype)
        nearer = usable(best) & ((best.float() - bottom).abs() < (s - bottom).abs())
        best = torch.where(nearer, best.float(), s)
        slope.addcmul_(pull, best - s, value=-1)
        self.scale[group] = best

    def _zero_point(self, group: int, columns: slice, block: Tensor, slope: Tensor) -> None:
        """The codes stay, so a zero point that grows by d takes d steps from every weight of the group."""
        s, zero = self.scale[group], self.zero[group]
        pull = block.sum(1)
        qmin, qmax = affine.code_range(self.scheme.bits)
        bottom = zero - slope.sum(0) / (s * pull.sum())
        moved = torch.where(torch.isfinite(bottom), bottom.round().clamp(qmin, qmax), zero) - zero
        slope.addr_(pull, s * moved)
        self.steps[columns] -= moved
        self.zero[group] += moved

    def result(self) -> Codes:
        codes = (self.steps + self.zero[self.group]).to(torch.int8).t().contiguous()
        scale = self.scale.t().to(self.dtype).contiguous()
        return codes, scale, None if self.scheme.symmetric else self.zero.t().to(torch.int8).contiguous()
