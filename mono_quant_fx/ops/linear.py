"""int4_linear and int8_linear: x @ dequantize(weight).T + bias, a tile of output rows at a time.

x is [..., K] of any float dtype and any leading dimensions; the result is [..., N] in x's dtype. The float weight never
exists whole in the forward; the backward (with respect to x and bias) dequantizes it once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mono_quant_fx.numerics import affine
from mono_quant_fx.ops import dispatch
from mono_quant_fx.ops.dequantize import check_int4, check_int8, dequantize_int4, dequantize_int8
from mono_quant_fx.ops.derivative import Derivative, Given
from mono_quant_fx.ops.operands import FLOATS, check_bias, check_compute, check_places
from mono_quant_fx.ops.registry import register


def _check_input(x: Tensor, rows: int, bias: Tensor | None) -> None:
    torch._check(
        x.dim() >= 1 and x.dtype in FLOATS,
        lambda: f"x: a float tensor [..., K] needed, not {tuple(x.shape)} of {x.dtype}",
    )
    check_bias(bias, rows)


class _Int4(NamedTuple):
    """int4_linear's arguments."""

    x: Tensor
    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    group_size: int
    compute: str = "auto"

    def check(self) -> None:
        """Raises RuntimeError unless they belong together."""
        check_places(x=self.x, weight_packed=self.packed, weight_scale=self.scale, bias=self.bias)
        torch._check(self.packed.dim() == 2, lambda: "weight_packed: int32 [N, ceil(K/8)] needed")
        _check_input(self.x, self.packed.shape[0], self.bias)
        check_int4(self.packed, self.scale, self.zero_point, self.group_size, self.x.shape[-1])
        check_compute(self.compute)


def _tiled_linear(x: Tensor, rows: int, bias: Tensor | None, tile: Callable[[slice], Tensor]) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 would be any number where there is no column
    out = flat.new_empty(flat.shape[0], rows)
    step = max(1, affine.TILE // max(1, x.shape[-1]))
    for start in range(0, rows, step):
        at = slice(start, min(start + step, rows))
        weight = tile(at).to(x.dtype).t()
        out[:, at] = flat @ weight if bias is None else torch.addmm(bias[at], flat, weight)
    return out.view(*x.shape[:-1], rows)


def _int4(*arguments: Any) -> Tensor:
    call = _Int4(*arguments)
    call.check()
    x, packed, scale, zero_point, bias, group_size, compute = call
    dtype = x.dtype
    if compute == "bfloat16":
        x = affine.round_to_bfloat16(x)
    if compute == "int8":
        x = affine.round_activations(x, group_size)
    rows, columns = packed.shape[0], x.shape[-1]
    width = packed.shape[1] * 8
    scratch = scale.new_empty(min(rows, max(1, affine.TILE // max(1, columns))), width)

    def tile(at: slice) -> Tensor:
        zero = None if zero_point is None else zero_point[at]
        return affine.dequantize_packed(packed[at], scale[at], zero, group_size, scratch)[:, :columns]

    return _tiled_linear(x, rows, bias, tile).to(dtype)


def _int4_cpu(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, size: int, compute: str = "auto"
) -> Tensor:
    def check() -> None:
        _Int4(x, packed, scale, zero, bias, size, compute).check()

    out, is_finite = dispatch.linear(4, x, affine.QuantizedWeight(packed, scale, zero), bias, size, compute, check)
    if out is None:
        return _int4(x, packed, scale, zero, bias, size, compute)
    return out if is_finite else _again(out, x, lambda rows: _int4(rows, packed, scale, zero, bias, size, compute))


def _again(out: Tensor, x: Tensor, reference: Callable[[Tensor], Tensor]) -> Tensor:
    """`out` with every row that is not finite computed anew, by the reference in float32.

    Kernels sum codes before the scale comes, and zero points beside the codes: infinity times what is 0 in the end, or
    a sum that overflows on the way, gives NaN or infinity where the float linear has a number, or the other infinity.
    """
    rows = out.view(-1, out.shape[-1])
    odd = ~rows.isfinite().all(1)
    rows[odd] = reference(x.reshape(-1, x.shape[-1])[odd].float()).to(out.dtype)
    return out


def _int4_fake(*arguments: Any) -> Tensor:
    call = _Int4(*arguments)
    call.check()
    return call.x.new_empty(*call.x.shape[:-1], call.packed.shape[0])


def _check_int8(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> None:
    check_places(x=x, weight=weight, weight_scale=scale, bias=bias)
    check_int8(weight, scale, zero_point)
    _check_input(x, weight.shape[0], bias)
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"x has {x.shape[-1]} columns, weight {weight.shape[1]}")


def _int8(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    _check_int8(x, weight, scale, zero_point, bias)

    def tile(at: slice) -> Tensor:
        return affine.dequantize(weight[at], scale[at], None if zero_point is None else zero_point[at], -1)

    return _tiled_linear(x, weight.shape[0], bias, tile)


def _int8_cpu(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    def check() -> None:
        _check_int8(x, weight, scale, zero_point, bias)

    out, is_finite = dispatch.linear(8, x, affine.QuantizedWeight(weight, scale, zero_point), bias, -1, "auto", check)
    if out is None:
        return _int8(x, weight, scale, zero_point, bias)
    return out if is_finite else _again(out, x, lambda rows: _int8(rows, weight, scale, zero_point, bias))


def _int8_fake(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    _check_int8(x, weight, scale, zero_point, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _by_x(matrix: Callable[[Given], Tensor]) -> Derivative:
    """Of x @ W.T with respect to x."""
    return Derivative(
        lambda given, grad: grad @ matrix(given).to(grad.dtype),
        lambda given, tangent: tangent @ matrix(given).to(tangent.dtype).t(),
    )


def _int4_matrix(given: Given) -> Tensor:
    shape, packed, scale, zero_point, _, group_size, *_ = given
    return dequantize_int4(packed, scale, zero_point, group_size, shape[-1])


#: Of ... + bias, along the last dimension, with respect to bias.
BY_BIAS = Derivative(lambda given, grad: grad, lambda given, tangent: tangent)

int4_linear = register(
    "int4_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
    "int group_size, str compute='auto') -> Tensor",
    _int4,
    _int4_fake,
    _int4_cpu,
    {0: _by_x(_int4_matrix), 4: BY_BIAS},
    leading=True,
    autocast=(0, 4),
)
int8_linear = register(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias) -> Tensor",
    _int8,
    _int8_fake,
    _int8_cpu,
    {0: _by_x(lambda given: dequantize_int8(*given[1:4])), 4: BY_BIAS},
    leading=True,
    autocast=(0, 4),
)
