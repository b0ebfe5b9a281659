"""GPTQ (arXiv 2210.17323): rounds a weight column by column and moves each error onto the columns still to come.

Symbols as in the paper's Algorithm 1: W [drow, dcol] the weight, H = 2 X X^T the Hessian of the layer's inputs
X [dcol, samples], lambda the damping, Hinv the Cholesky factor of H^-1 (sec. 3.3, step 3), B the width of the block
whose updates stay local (step 2), Q the rounded weight, E the block's errors.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mono_quant_fx import numerics
from mono_quant_fx.clip import search_qparams
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.errors import WeightError

B = 128


def gptq(
    weight: Tensor, H: Tensor, scheme: QuantScheme, *, damping: float = 0.01, activation_order: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int8 [N, K], scale [N, G] and zero_point int8 [N, G] (None when symmetric) of a float matrix [N, K].

    Args:
        weight: float [N, K].
        H: float [K, K], X X^T over the calibration inputs up to a positive factor.
        scheme: bits, group size, symmetry; scales come from the energy-weighted search of clip.py.
        damping: lambda as a fraction of the mean of H's diagonal.
        activation_order: round the columns of largest energy first, with all scales searched beforehand, so that
            groups stay where they are in storage. Otherwise a group's scales are searched when the walk reaches it, on
            the weights as the updates have left them.

    No row ends with a larger error (w - q) H (w - q)^T than plain rounding with the same scales gives it.

    Raises:
        WeightError: the weight holds NaN or infinity, or H is no Hessian (it is not positive even when damped).
    """
    columns, dtype = weight.shape[1], weight.dtype
    energy = H.diagonal()
    order = torch.argsort(energy, descending=True, stable=True) if activation_order else torch.arange(columns)
    Hinv = _inverse_factor(H, damping, order)
    scale, zero_point = search_qparams(weight, scheme, energy)
    W = weight.float()[:, order].t().contiguous().t()  # its columns lie in one piece
    codes = torch.empty_like(W, dtype=torch.int8)
    size = columns if scheme.group_size == -1 else scheme.group_size
    width = B if B % size == 0 or size % B == 0 else size  # a group never begins in one block and ends in the next
    for i in range(0, columns, width):
        last = min(i + width, columns)
        E = torch.empty_like(W[:, i:last])
        for j in range(i, last):
            group = int(order[j]) // size
            if not activation_order and j % size == 0:
                part = search_qparams(
                    W[:, j : j + size].to(dtype), replace(scheme, group_size=-1), energy[j : j + size]
                )
                scale[:, group] = part[0][:, 0]
                if zero_point is not None and part[1] is not None:
                    zero_point[:, group] = part[1][:, 0]
            at = slice(group, group + 1)
            zero = None if zero_point is None else zero_point[:, at]
            codes[:, j : j + 1] = numerics.quantize(W[:, j : j + 1], scale[:, at], zero, _whole_row(scheme))
            Q = numerics.dequantize(codes[:, j : j + 1], scale[:, at].float(), zero, -1)[:, 0]
            E[:, j - i] = (W[:, j] - Q) / Hinv[j, j]
            W[:, j:last] -= torch.outer(Hinv[j, j:last], E[:, j - i]).t()
        W[:, last:] -= E @ Hinv[i:last, last:]
    codes = codes[:, torch.argsort(order)]
    return _no_worse_than_rounding(weight, codes, scale, zero_point, H, scheme), scale, zero_point


def _whole_row(scheme: QuantScheme) -> QuantScheme:
    return replace(scheme, group_size=-1)


def _inverse_factor(H: Tensor, damping: float, order: Tensor) -> Tensor:
    """The upper Cholesky factor of (H + lambda I)^-1 in float32, the columns in `order`."""
    damped = H.double()[order][:, order]
    mean = damped.diagonal().mean()
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0 or not bool(torch.isfinite(lower).all()):
        raise WeightError(
            f"its Hessian is not positive with damping={damping}; calibrate on more samples, raise the damping or use "
            "algorithm='clip'"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def _no_worse_than_rounding(
    weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, H: Tensor, scheme: QuantScheme
) -> Tensor:
    plain = numerics.quantize(weight.float(), scale, zero_point, scheme)
    keep = hessian_error(weight, codes, scale, zero_point, H, scheme) <= hessian_error(
        weight, plain, scale, zero_point, H, scheme
    )
    return torch.where(keep[:, None], codes, plain)


def hessian_error(
    weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, H: Tensor, scheme: QuantScheme
) -> Tensor:
    """(w - q) H (w - q)^T of each row [N]: the squared error of the layer's output on the calibration inputs."""
    error = weight.float() - numerics.dequantize(codes, scale.float(), zero_point, scheme.group_size)
    return (error @ H.float() * error).sum(1)
