"""dequantize_int4 and dequantize_int8: stored codes to the float matrix [N, K], in the scale's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from mono_quant_fx.numerics import affine
from mono_quant_fx.ops import forking, native
from mono_quant_fx.ops.operands import check_places, check_qparams
from mono_quant_fx.ops.registry import register


def check_int4(packed: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, columns: int) -> None:
    """Raises RuntimeError unless the tensors are one stored INT4 matrix [N, columns] (see DESIGN of the storage)."""
    check_places(weight_packed=packed, weight_scale=scale, weight_zero_point=zero_point)
    torch._check(
        packed.dtype == torch.int32 and packed.dim() == 2,
        lambda: "weight_packed: int32 [N, ceil(K/8)] needed",
    )
    torch._check(
        group_size == -1 or (group_size > 0 and group_size % 8 == 0),
        lambda: f"group_size={group_size}: a positive multiple of 8, or -1, needed",
    )
    torch._check(columns >= 0, lambda: f"in_features={columns}: 0 or more columns needed")
    torch._check(
        packed.shape[1] == (columns + 7) // 8,
        lambda: f"weight_packed has {packed.shape[1]} words a row, but {columns} columns need {(columns + 7) // 8}",
    )
    shape = (packed.shape[0], affine.num_groups(columns, group_size))
    check_qparams(scale, zero_point, shape, f"group_size={group_size} needs {shape}")


def check_int8(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    """Raises RuntimeError unless weight is int8 [N, K], and scale and zero_point are [N, 1]."""
    check_places(weight=weight, weight_scale=scale, weight_zero_point=zero_point)
    torch._check(weight.dtype == torch.int8 and weight.dim() == 2, lambda: "weight: int8 [N, K] needed")
    shape = (weight.shape[0], 1)
    check_qparams(scale, zero_point, shape, f"{shape} needed")


def _int4(packed: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, in_features: int) -> Tensor:
    check_int4(packed, scale, zero_point, group_size, in_features)
    stored = affine.QuantizedWeight(packed, scale, zero_point)
    return affine.dequantize_weight(stored, group_size, in_features)


def _int4_cpu(packed: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, in_features: int) -> Tensor:
    check_int4(packed, scale, zero_point, group_size, in_features)
    stored = affine.QuantizedWeight(packed, scale, zero_point)
    return _by_kernel(4, stored, group_size, in_features)


def _by_kernel(bits: int, stored: affine.QuantizedWeight, group_size: int, columns: int) -> Tensor:
    """The kernel's bits are the reference's."""
    forking.settle()
    if native.path() == "torch" or not native.takes(stored) or stored.weight_packed.numel() == 0:
        return affine.dequantize_weight(stored, group_size, columns)
    out = stored.weight_scale.new_empty(stored.weight_packed.shape[0], columns)
    native.dequantize(bits, stored, group_size, out)
    return out


def _int4_fake(packed: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, in_features: int) -> Tensor:
    check_int4(packed, scale, zero_point, group_size, in_features)
    return scale.new_empty(packed.shape[0], in_features)


def _int8(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    check_int8(weight, scale, zero_point)
    return affine.dequantize(weight, scale, zero_point, -1)


def _int8_cpu(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    check_int8(weight, scale, zero_point)
    return _by_kernel(8, affine.QuantizedWeight(weight, scale, zero_point), -1, weight.shape[1])


def _int8_fake(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    check_int8(weight, scale, zero_point)
    return scale.new_empty(weight.shape)


dequantize_int4 = register(
    "dequantize_int4(Tensor weight_packed, Tensor weight_scale, Tensor? weight_zero_point, int group_size, "
    "int in_features) -> Tensor",
    _int4,
    _int4_fake,
    cpu=_int4_cpu,
    derivatives={},
)
dequantize_int8 = register(
    "dequantize_int8(Tensor weight, Tensor weight_scale, Tensor? weight_zero_point) -> Tensor",
    _int8,
    _int8_fake,
    cpu=_int8_cpu,
    derivatives={},
)
