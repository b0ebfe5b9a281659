"""Affine, group-wise quantization and the packed INT4 layout. Pure functions over a weight matrix [N, K].

A group is `group_size` neighbouring columns of one row; -1 is the whole row, and the last group may be shorter.
The equation is the affine map of arXiv 1712.05877 (eq. 1), w = scale * (q - zero_point), with q the integer code:

    symmetric    scale = max|w| / ((qmax - qmin) / 2)            zero_point = 0
    asymmetric   scale = (max(w, 0) - min(w, 0)) / (qmax - qmin)   zero_point = qmin - round(min(w, 0) / scale)

    INT4 codes are -8..7 and are stored as q + 8, eight to an int32, the first column in the lowest bits:

    bit   31   28 27   24 23   20 19   16 15   12 11    8 7     4 3     0
         | q7 + 8| q6 + 8| q5 + 8| q4 + 8| q3 + 8| q2 + 8| q1 + 8| q0 + 8|     columns 8j .. 8j + 7 of a row
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mono_quant_fx.config import QuantScheme, check_group_size
from mono_quant_fx.errors import WeightError
from mono_quant_fx.process.surroundings import in_plain_surroundings

if sys.byteorder != "little":  # the packed words are viewed as bytes
    raise ImportError("mono_quant_fx reads packed words as little-endian bytes; this machine is big-endian")

#: Elements of a weight that are worked on at a time: the float scratch stays at 2 MB.
TILE = 1 << 19
#: Groups of activations whose largest magnitude is below it count as zeros: 127 divided by it must be finite.
SMALLEST = 1e-36


class QuantizedWeight(NamedTuple):
    """A stored weight: INT4 codes int32 [N, ceil(K/8)] or INT8 codes int8 [N, K]; scale [N, G] in the weight's dtype;
    zero_point int8 [N, G], or None when symmetric.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None


def code_range(bits: int) -> tuple[int, int]:
    """qmin, qmax of a signed code.

    >>> code_range(4)
    (-8, 7)
    """
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def num_groups(columns: int, group_size: int) -> int:
    """G = ceil(K / group_size), and 1 for the whole row."""
    return 1 if group_size == -1 else -(-columns // group_size)


def choose_qparams(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """Scale [N, G] in weight's dtype and zero_point int8 [N, G] (None when symmetric) from each group's extremes.

    Computed in float32; the scale is at least the smallest normal of its dtype (and of float32), so that an all-zero
    group is 0 * scale, and at most what keeps every code finite.

    Raises:
        WeightError: the weight holds NaN or infinity.

    >>> choose_qparams(torch.tensor([[0.0, 1.5, -1.0, 0.5]]), QuantScheme(4, -1))
    (tensor([[0.2000]]), None)
    """
    qmin, qmax = code_range(scheme.bits)
    parts = [part.float() for part, _ in grouped(weight, scheme.group_size)]
    low = torch.cat([p.amin(-1) for p in parts], 1).clamp(max=0.0)  # torch.aminmax takes six times as long as both
    high = torch.cat([p.amax(-1) for p in parts], 1).clamp(min=0.0)
    if not bool(torch.isfinite(high - low.double()).all()):
        raise WeightError(
            "it holds NaN or infinity (or exceeds float32), which no code can stand for; repair it or skip this layer"
        )
    if scheme.symmetric:
        scale = torch.maximum(high, -low) / ((qmax - qmin) / 2)
    else:
        scale = high / (qmax - qmin) - low / (qmax - qmin)
    info = torch.finfo(weight.dtype)
    least = max(info.tiny, torch.finfo(torch.float32).tiny)  # float64's own would be 0 in float32
    farthest = -qmin if scheme.symmetric else qmax - qmin  # codes from zero: none may come out as infinity
    scale = scale.double().clamp(least, info.max / farthest / 1.01).to(weight.dtype)
    if scheme.symmetric:
        return scale, None
    zero_point = (qmin - torch.round(low / scale.float())).clamp(qmin, qmax)
    return scale, zero_point.to(torch.int8)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Codes int8 [N, K] of a float weight [N, K]: clamp(round(w / scale) + zero_point, qmin, qmax), halves to even.

    >>> quantize(torch.tensor([[0.0, 1.5, -1.0, 0.5]]), torch.tensor([[0.2]]), None, QuantScheme(4, -1))
    tensor([[ 0,  7, -5,  2]], dtype=torch.int8)
    """
    qmin, qmax = code_range(scheme.bits)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for (w, at), (q, _) in zip(grouped(weight, scheme.group_size), grouped(codes, scheme.group_size), strict=True):
        scaled = torch.div(w.float(), scale[:, at, None].float()).round_()
        if zero_point is not None:
            scaled += zero_point[:, at, None]
        q.copy_(scaled.clamp_(qmin, qmax))
    return codes


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    """scale * (q - zero_point) as a float matrix [N, K] in scale's dtype: exact but for the one product's rounding.

    >>> dequantize(torch.tensor([[0, 7, -5, 2]]), torch.tensor([[0.5]]), None, -1)
    tensor([[ 0.0000,  3.5000, -2.5000,  1.0000]])
    """
    weight = codes.to(scale.dtype, copy=True)
    _scale_groups(weight, scale, zero_point, group_size, offset=0)
    return weight


def fake_quantize(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """dequantize(quantize(weight)) without packing: the oracle for everything that packs."""
    scale, zero_point = choose_qparams(weight, scheme)
    return dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme.group_size)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes -8..7, int8 [N, K] -> int32 [N, ceil(K/8)]; the words' unused high nibbles are 0.

    >>> f"{pack_int4(torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1]], dtype=torch.int8)).item():08x}"
    '76543210'
    """
    rows, columns = codes.shape
    padded = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.uint8, device=codes.device)
    torch.add(codes, 8, out=padded.view(torch.int8)[:, :columns])
    pairs = padded.view(torch.int16)  # low byte the even column, high byte the odd one
    return (pairs | (pairs >> 4)).to(torch.uint8).view(torch.int32)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The inverse of pack_int4: int32 [N, ceil(columns/8)] -> int8 [N, columns]."""
    nibbles = packed.contiguous().view(torch.uint8)
    return torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(1)[:, :columns].view(torch.int8).sub(8)


def dequantize_packed(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, scratch: Tensor
) -> Tensor:
    """dequantize(unpack_int4(packed)) into `scratch` [>= N, ceil(K/8) * 8] of scale's dtype, without a code tensor."""
    bytes_ = packed.contiguous().view(torch.uint8)
    weight = scratch[: packed.shape[0]]
    weight[:, 0::2] = bytes_ & 15
    weight[:, 1::2] = bytes_ >> 4
    return _scale_groups(weight, scale, zero_point, group_size, offset=8)


def quantize_matrix(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Rounds a float matrix [N, K] to `scheme`, a tile of rows at a time, so that the scratch never grows with it.

    Raises:
        WeightError: the matrix holds NaN or an infinity, is empty, is not floating point, or is beyond float32.
    """
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise WeightError(f"a non-empty float matrix is needed, not {tuple(weight.shape)} of {weight.dtype}")
    if weight.dtype == torch.float64:
        check_range(weight)
    step = max(1, TILE // weight.shape[1])
    parts = [_quantize_tile(tile, scheme) for tile in weight.detach().split(step)]
    packed, scale, zero_point = zip(*parts, strict=True)
    return QuantizedWeight(
        torch.cat(packed),
        torch.cat(scale),
        None if scheme.symmetric else torch.cat([z for z in zero_point if z is not None]),
    )


@in_plain_surroundings
def quantize_weight_int4(
    weight: Tensor, group_size: int = 128, axis: int = 0, symmetric: bool = True
) -> QuantizedWeight:
    """Packs any float weight to INT4, group-wise along everything but `axis`.

    Args:
        weight: float tensor with at least two dimensions; viewed as the matrix [size(axis), rest].
        group_size: columns of that matrix that share a scale: a positive multiple of 8, or -1 for the whole row.
        axis: the output channels.
        symmetric: False adds an integer zero point a group.

    Returns:
        QuantizedWeight: weight_packed int32 [N, ceil(K/8)], weight_scale [N, G] in weight's dtype, weight_zero_point
        int8 [N, G] or None.

    Raises:
        ConfigError: a bad group_size.
        WeightError: NaN, infinity, an empty weight, a dtype that is no float, or no dense tensor with values.

    >>> packed, scale, zero_point = quantize_weight_int4(torch.randn(256, 384))
    >>> packed.shape, scale.shape, zero_point
    (torch.Size([256, 48]), torch.Size([256, 3]), None)
    """
    check_group_size(group_size)
    if not isinstance(weight, Tensor) or weight.is_meta or weight.layout != torch.strided:
        what = type(weight).__name__ if not isinstance(weight, Tensor) else f"one on {weight.device}, {weight.layout}"
        raise WeightError(f"quantize_weight_int4: a dense tensor with values is needed, not {what}")
    if weight.dim() < 2 or not -weight.dim() <= axis < weight.dim():
        raise WeightError(
            f"axis={axis} of a weight of shape {tuple(weight.shape)}: an axis of at least [out, in] is needed"
        )
    return quantize_matrix(weight.movedim(axis, 0).flatten(1), QuantScheme(4, group_size, symmetric))


def dequantize_weight(stored: QuantizedWeight, group_size: int, columns: int) -> Tensor:
    """The float matrix [N, columns] that `stored` (INT4 or INT8) stands for, whole, in the scale's dtype."""
    packed, scale, zero_point = stored
    if packed.dtype == torch.int8:
        return dequantize(packed, scale, zero_point, -1)
    full = scale.new_empty(packed.shape[0], packed.shape[1] * 8)
    step = max(1, TILE // max(1, full.shape[1]))
    for start in range(0, packed.shape[0], step):
        rows = slice(start, start + step)
        zero = None if zero_point is None else zero_point[rows]
        dequantize_packed(packed[rows], scale[rows], zero, group_size, full[rows])
    return full[:, :columns].contiguous()


def check_range(weight: Tensor) -> None:
    """Raises WeightError where the largest magnitude of a float64 weight is none that float32 has."""
    most, info = float(weight.detach().abs().amax()), torch.finfo(torch.float32)
    if info.max < most < math.inf or 0.0 < most < info.tiny:
        side = "exceeds float32" if most > info.max else "is below what float32 can hold"
        raise WeightError(
            f"its largest magnitude, {most:.3g}, {side}, in which codes and scales are worked out; rescale the model "
            "or skip this layer"
        )


def _quantize_tile(tile: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    tile = tile.contiguous()
    scale, zero_point = choose_qparams(tile, scheme)
    codes = quantize(tile, scale, zero_point, scheme)
    return QuantizedWeight(pack_int4(codes) if scheme.bits == 4 else codes, scale, zero_point)


def round_activations(x: Tensor, group_size: int) -> Tensor:
    """x [..., K] rounded to INT8 values, one scale for each row and group; float32 (float64 where x is).

    scale = max |x| / 127 over the group, code = round(x * (127 / max |x|)), x' = scale * code, in float32 at each step.
    A group that holds NaN or infinity stays as it is, so that they meet the weights that they would meet unrounded.

    >>> round_activations(torch.tensor([[1.0, -0.5, 0.1, 0.0]]), -1)
    tensor([[ 1.0000, -0.5039,  0.1024,  0.0000]])
    """
    columns = x.shape[-1]
    size = max(1, columns if group_size == -1 else min(columns, group_size))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    groups = F.pad(x, (0, -columns % size)).unflatten(-1, (-1, size))
    most = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(most < SMALLEST, 0.0, torch.div(torch.full_like(most, 127.0), most))
    rounded = (groups * inverse).round_() * (most / 127.0)
    return torch.where(torch.isfinite(most), rounded, groups).flatten(-2)[..., :columns]


def round_to_bfloat16(x: Tensor) -> Tensor:
    """x rounded to bfloat16, in its own dtype; what would become infinite there, from 3.4e38 on, stays as it is."""
    rounded = x.bfloat16().to(x.dtype)
    return torch.where(rounded.isinf(), x, rounded)


def grouped(x: Tensor, group_size: int) -> Iterator[tuple[Tensor, slice]]:
    """Views of [N, K] as [N, whole groups, group_size], then the ragged rest as [N, 1, rest]; with places in G."""
    columns = x.shape[1]
    size = max(1, columns) if group_size == -1 else group_size
    whole = columns // size
    if whole:
        yield x[:, : whole * size].unflatten(1, (whole, size)), slice(0, whole)
    if columns % size:
        yield x[:, None, whole * size :], slice(whole, whole + 1)


def _scale_groups(weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, offset: int) -> Tensor:
    for w, at in grouped(weight, group_size):
        w -= offset if zero_point is None else zero_point[:, at, None].to(w.dtype) + offset  # int8 would wrap
        w *= scale[:, at, None]
    return weight
