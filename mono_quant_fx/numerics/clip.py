"""Better scales than the extremes give: each group's scale is searched for the least energy-weighted rounding error.

For a group w with input energies e = E[x^2] the error of the layer's output is, for uncorrelated inputs, the sum of
e * (w - scale * (q - zero_point))^2. The search shrinks the range by a grid of ratios (the clipping of OMSE,
arXiv 1902.06822 sec. 3.1), and after each rounding also tries the least-squares scale of the codes that it gave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine

#: Shrinking ratios that are tried on every group's range; the first is the plain rounding's own range.
RATIOS = tuple(1.0 - 0.025 * i for i in range(25))


def search_qparams(weight: Tensor, scheme: QuantScheme, energy: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale [N, G] in weight's dtype and zero_point int8 [N, G] (None when symmetric) of least weighted error.

    Args:
        weight: float [N, K]; scheme: bits, group size and symmetry.
        energy: float [K], E[x^2] of each input column; None weighs all columns alike.

    Never worse than numerics.choose_qparams in the weighted error, group by group: its range is the first candidate.

    Raises:
        WeightError: the weight holds NaN or infinity.
    """
    step = max(1, affine.TILE // weight.shape[1])
    parts = [_search(tile.contiguous(), scheme, energy) for tile in weight.split(step)]
    scale, zero_point = zip(*parts, strict=True)
    return torch.cat(scale), None if scheme.symmetric else torch.cat(zero_point)


def _search(tile: Tensor, scheme: QuantScheme, energy: Tensor | None) -> tuple[Tensor, Tensor]:
    best_scale, best_zero = affine.choose_qparams(tile, scheme)
    zeros = torch.zeros_like(best_scale, dtype=torch.int8) if best_zero is None else best_zero
    weights = torch.ones(tile.shape[1]) if energy is None else energy.float()
    columns = affine.grouped(weights[None].to(tile.device), scheme.group_size)
    found = [
        _search_groups(part.float(), e, best_scale[:, at], zeros[:, at], scheme)
        for (part, at), (e, _) in zip(affine.grouped(tile, scheme.group_size), columns, strict=True)
    ]
    return torch.cat([s for s, _ in found], 1), torch.cat([z for _, z in found], 1)


def _search_groups(
    w: Tensor, energy: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    """w [N, G, g], energy [1, G, g], and the scales [N, G] to beat; returns the best scale and zero point.

    For codes c (less the zero point) the error is sum e w^2 - 2 s sum e w c + s^2 sum e c^2: two sums a ratio give the
    error for every scale, and its least at s = sum e w c / sum e c^2.
    """
    qmin, qmax = affine.code_range(scheme.bits)
    least = torch.full_like(w[..., 0], float("inf"))
    widest, best_scale, best_zero = scale.float(), scale.clone(), zero_point.clone()
    weighted, codes, product = w * energy, torch.empty_like(w), torch.empty_like(w)
    for ratio in RATIOS:
        s = (widest * ratio).to(scale.dtype)
        z = zero_point if scheme.symmetric else _zero_point(w, s, ratio, qmin, qmax)
        _codes(w, s, z, scheme, out=codes)
        linear = torch.mul(weighted, codes, out=product).sum(-1)
        square = torch.mul(codes, codes, out=product).mul_(energy).sum(-1)
        refitted = (linear / square).to(scale.dtype)
        for candidate in (s, torch.where(usable(refitted), refitted, s)):
            error = (candidate.float() * square - 2.0 * linear) * candidate.float()
            better = error < least
            least = torch.where(better, error, least)
            best_scale, best_zero = torch.where(better, candidate, best_scale), torch.where(better, z, best_zero)
    # the sums above round off what is small beside the weight's own energy: the winner is compared term by term
    plain, found = (_error(w, energy, s, z, scheme) for s, z in ((scale, zero_point), (best_scale, best_zero)))
    return torch.where(found < plain, best_scale, scale), torch.where(found < plain, best_zero, zero_point)


def usable(scale: Tensor) -> Tensor:
    """Where a scale is a normal number (of its dtype and of float32) and leaves 16 steps of it finite; NaN is not."""
    info = torch.finfo(scale.dtype)
    return (scale >= max(info.tiny, torch.finfo(torch.float32).tiny)) & (scale <= info.max / 16)


def _zero_point(w: Tensor, scale: Tensor, ratio: float, qmin: int, qmax: int) -> Tensor:
    low = w.amin(-1).clamp(max=0.0) * ratio
    return (qmin - torch.round(low / scale.float())).clamp(qmin, qmax).to(torch.int8)


def _codes(w: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme, out: Tensor) -> Tensor:
    """Codes less the zero point."""
    qmin, qmax = affine.code_range(scheme.bits)
    zero = zero_point[..., None].float()
    return torch.div(w, scale[..., None].float(), out=out).round_().clamp_(qmin - zero, qmax - zero)


def _error(w: Tensor, energy: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    codes = _codes(w, scale, zero_point, scheme, out=torch.empty_like(w))
    return torch.addcmul(w, codes, scale[..., None].float(), value=-1).square_().mul_(energy).sum(-1)
