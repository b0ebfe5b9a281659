"""Other formats' packed weights as ours, exactly: compressed-tensors, GPTQ and AWQ. Pure functions.

    format               codes                                zero points                     scales
    compressed-tensors   int32 [N, ceil(K/8)], as ours        int32 [ceil(N/8), G], by rows   [N, G]
    GPTQ                 int32 [K/8, N], columns of a word    int32 [G, N/8], less 1 in v1    [G, N]
    AWQ (gemm)           int32 [K, N/8], nibble i of a word   int32 [G, N/8], in that order   [G, N]
                         holds row (0 2 4 6 1 3 5 7)[i]

GPTQ and AWQ codes and zero points are 0..15 (0..255 for 8 bits); ours are the same numbers less 8 (128).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mono_quant_fx.numerics import affine
from mono_quant_fx.numerics.affine import QuantizedWeight


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / bits], the lowest bits first.

    >>> unpack_words(torch.tensor([0x76543210], dtype=torch.int32), 4)
    tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
    """
    bytes_ = _dense(words).view(torch.uint8)
    return bytes_ if bits == 8 else torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(-2)


def signed(unsigned: Tensor, bits: int) -> Tensor:
    """Codes 0..2^bits - 1 as int8, less half their range.

    >>> signed(torch.tensor([0, 8, 15], dtype=torch.uint8), 4)
    tensor([-8,  0,  7], dtype=torch.int8)
    """
    return (unsigned ^ 0x80).view(torch.int8) if bits == 8 else unsigned.view(torch.int8) - 8


def pack_zero_points(zero_point: Tensor) -> Tensor:
    """INT4 zero points int8 [N, G] as compressed-tensors stores them: int32 [ceil(N/8), G]."""
    return affine.pack_int4(zero_point.t()).t().contiguous()


def unpack_zero_points(packed: Tensor, rows: int, bits: int = 4) -> Tensor:
    """The inverse of pack_zero_points: int32 [ceil(N * bits/32), G] -> int8 [N, G]."""
    return signed(unpack_words(packed.t(), bits), bits)[:, :rows].t().contiguous()


def from_packed(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, bits: int = 4
) -> QuantizedWeight:
    """A compressed-tensors weight, `pack-quantized`: int32 [N, ceil(K * bits/32)], scale [N, G], packed zero points."""
    codes = packed if bits == 4 else signed(unpack_words(packed, 8), 8)[:, :columns].contiguous()
    zero = None if zero_point is None else unpack_zero_points(zero_point, packed.shape[0], bits)
    return QuantizedWeight(codes, scale, zero)


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, order: Tensor | None, bits: int = 4, zero_offset: int = 1
) -> QuantizedWeight:
    """A GPTQ weight: qweight int32 [K * bits/32, N], qzeros int32 [G, N * bits/32], scales [G, N].

    Args:
        order: which of the G groups each run of columns is of (see group_order); None where they stand in order.
        zero_offset: what is added to the stored zero points: 1 in the first version of the format, 0 in the second.
    """
    zeros = (unpack_words(qzeros, bits).to(torch.int16) + zero_offset) & ((1 << bits) - 1)
    if order is not None:
        scales, zeros = scales[order], zeros[order]
    words = _dense(qweight.t())
    codes = words if bits == 4 else signed(unpack_words(words, 8), 8)
    return QuantizedWeight(codes, _dense(scales.t()), _zero_point(zeros.to(torch.uint8), bits))


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedWeight:
    """An AWQ weight of version gemm: qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]."""
    codes = signed(_in_order(unpack_words(qweight, 4)), 4).t()
    zeros = _in_order(unpack_words(qzeros, 4))
    return QuantizedWeight(affine.pack_int4(codes), _dense(scales.t()), _zero_point(zeros, 4))


def group_order(g_idx: Tensor, groups: int) -> Tensor | None:
    """Group of each run of K / groups columns, int64 [groups]; None where a run mixes groups.

    >>> group_order(torch.tensor([1, 1, 0, 0]), 2), group_order(torch.tensor([1, 0, 1, 0]), 2)
    (tensor([1, 0]), None)
    """
    columns = g_idx.numel()
    if groups == 0 or columns % groups or bool(((g_idx < 0) | (g_idx >= groups)).any()):
        return None
    runs = g_idx.long().view(groups, -1)
    return runs[:, 0].contiguous() if bool((runs == runs[:, :1]).all()) else None


def _dense(tensor: Tensor) -> Tensor:
    """Rows in one piece, with the strides that say so: a transposed row of one column has others."""
    dense = tensor.is_contiguous() and (tensor.dim() == 0 or tensor.stride(-1) == 1)
    return tensor if dense else tensor.clone(memory_format=torch.contiguous_format)


def _in_order(nibbles: Tensor) -> Tensor:
    """The columns of each AWQ word in their own order: columns 2i and 2i + 1 lie in the nibbles i and i + 4."""
    return nibbles.unflatten(-1, (-1, 2, 4)).transpose(-1, -2).flatten(-3)


def _zero_point(unsigned: Tensor, bits: int) -> Tensor | None:
    """int8 [N, G] from [G, N]; None where all are the middle of the range, which is what symmetric means."""
    if bool((unsigned == 1 << (bits - 1)).all()):
        return None
    return signed(_dense(unsigned.t()), bits)
