"""Ops on INT8 activations: w8a8_linear, w8a8_conv (INT8 weights), w4a8_linear (INT4 weights). The bias has a gradient.

x holds the codes of quantize_activation. The reference dequantizes both sides and computes in float32; where oneDNN's
INT8 kernels can run, w8a8 does, and the two differ by float32 rounding alone (docs/numerics.md has the tolerance).
The result has weight_scale's dtype, which is the model's; under autocast its type, rounded once at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mono_quant_fx.numerics import affine
from mono_quant_fx.numerics.affine import QuantizedWeight
from mono_quant_fx.ops import forking, onednn
from mono_quant_fx.ops.activation import Codes
from mono_quant_fx.ops.dequantize import check_int4, check_int8
from mono_quant_fx.ops.derivative import Derivative
from mono_quant_fx.ops.linear import BY_BIAS, int4_linear
from mono_quant_fx.ops.operands import check_bias, check_compute
from mono_quant_fx.ops.registry import register
from mono_quant_fx.ops.window import Window

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def reference_linear(x: Codes, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """w8a8_linear by dequantizing both sides: F.linear in float32 (float64 for a float64 model)."""
    values, matrix, bias = _floats(x, weight, bias)
    return F.linear(values, matrix, bias).to(weight.weight_scale.dtype)


def reference_conv(x: Codes, weight: QuantizedWeight, bias: Tensor | None, window: Window) -> Tensor:
    """w8a8_conv by dequantizing both sides: a convolution in float32 (float64 for a float64 model)."""
    values, matrix, bias = _floats(x, weight, bias)
    kernels = matrix.view(len(matrix), x.codes.shape[1] // window.groups, *window.size)
    out = CONVS[len(window.size)](values, kernels, bias, window.stride, window.padding, window.dilation, window.groups)
    return out.to(weight.weight_scale.dtype)


def _floats(x: Codes, weight: QuantizedWeight, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, scale, zero_point = weight
    dtype = torch.promote_types(scale.dtype, torch.float32)
    matrix = affine.dequantize(codes, scale.to(dtype), zero_point, -1)
    return x.values(dtype), matrix, None if bias is None else bias.to(dtype)


def _linear(*arguments: Any) -> Tensor:
    x, weight, bias = _operands(arguments)
    _check_linear(x, weight, bias)
    forking.settle()
    if not onednn.can_run(x, weight):
        return reference_linear(x, weight, bias)
    codes = x.codes.reshape(-1, x.codes.shape[-1])
    rows = onednn.linear(x._replace(codes=codes), weight, bias)
    return rows.view(*x.codes.shape[:-1], rows.shape[1])


def _linear_fake(*arguments: Any) -> Tensor:
    x, weight, bias = _operands(arguments)
    _check_linear(x, weight, bias)
    return weight.weight_scale.new_empty(*x.codes.shape[:-1], weight.weight_packed.shape[0])


def _int4_linear(*arguments: Any) -> Tensor:
    x, weight, bias = _operands(arguments)
    _check_int4_linear(x, weight, bias, *arguments[7:])
    forking.settle()
    scale = weight.weight_scale
    # whole numbers up to 255 are exact in bfloat16 as well, so that the scale of x comes last
    dtype = torch.promote_types(scale.dtype, torch.float32)
    steps = x.codes.to(dtype) - x.zero_point.to(dtype)
    group_size, compute = arguments[7], arguments[8] if len(arguments) > 8 else "auto"
    compute = "auto" if compute == "int8" else compute  # x is INT8 already
    out = int4_linear(steps, *weight, None, group_size, compute) * x.scale.to(dtype)
    if out.is_cpu and not out.isfinite().all():  # sums may have overflowed before that; elsewhere asking would wait
        out = int4_linear(x.values(dtype), *weight, None, group_size, compute)
    return (out if bias is None else out + bias).to(scale.dtype)


def _int4_linear_fake(*arguments: Any) -> Tensor:
    x, weight, bias = _operands(arguments)
    _check_int4_linear(x, weight, bias, *arguments[7:])
    return weight.weight_scale.new_empty(*x.codes.shape[:-1], weight.weight_packed.shape[0])


def _conv(*arguments: Any) -> Tensor:
    x, weight, bias = _operands(arguments)
    window = Window(*arguments[7:])
    _check_conv(x, weight, bias, window)
    forking.settle()
    if x.codes.numel() == 0 or weight.weight_packed.numel() == 0:
        return _conv_of_nothing(x, weight, bias, window)
    is_batch = x.codes.dim() == len(window.size) + 2
    batch = x if is_batch else x._replace(codes=x.codes[None])
    convolve = onednn.conv if onednn.can_run(batch, weight) else reference_conv
    out = convolve(batch, weight, bias, window).contiguous()
    return out if is_batch else out[0]


def _conv_of_nothing(x: Codes, weight: QuantizedWeight, bias: Tensor | None, window: Window) -> Tensor:
    """No sample, no channel or a size of 0 inside its padding: each result is the bias."""
    out = _conv_out(x, weight, window).zero_()
    return out if bias is None else out.add_(bias.to(out.dtype).view(-1, *[1] * len(window.size)))


def _conv_fake(*arguments: Any) -> Tensor:
    x, weight, bias = _operands(arguments)
    window = Window(*arguments[7:])
    _check_conv(x, weight, bias, window)
    return _conv_out(x, weight, window)


def _conv_out(x: Codes, weight: QuantizedWeight, window: Window) -> Tensor:
    before, sizes = x.codes.shape[: -len(window.size) - 1], window.out_sizes(x.codes.shape)
    return weight.weight_scale.new_empty(*before, weight.weight_packed.shape[0], *sizes)


def _operands(arguments: tuple[Any, ...]) -> tuple[Codes, QuantizedWeight, Tensor | None]:
    """Every op begins with x, its scale and zero point, then the stored weight, then the bias."""
    return Codes(*arguments[:3]), QuantizedWeight(*arguments[3:6]), arguments[6]


def _check_linear(x: Codes, weight: QuantizedWeight, bias: Tensor | None) -> None:
    x.check(weight=weight.weight_packed, bias=bias)
    check_int8(*weight)
    check_bias(bias, weight.weight_packed.shape[0])
    columns = weight.weight_packed.shape[1]
    torch._check(
        x.codes.dim() >= 1 and x.codes.shape[-1] == columns,
        lambda: f"x is {tuple(x.codes.shape)}; {columns} columns needed",
    )


def _check_int4_linear(
    x: Codes, weight: QuantizedWeight, bias: Tensor | None, group_size: int, compute: str = "auto"
) -> None:
    x.check(weight_packed=weight.weight_packed, bias=bias)
    torch._check(x.codes.dim() >= 1, lambda: f"x is {tuple(x.codes.shape)}; [..., K] needed")
    check_int4(*weight, group_size, x.codes.shape[-1])
    check_bias(bias, weight.weight_packed.shape[0])
    check_compute(compute)


def _check_conv(x: Codes, weight: QuantizedWeight, bias: Tensor | None, window: Window) -> None:
    x.check(weight=weight.weight_packed, bias=bias)
    check_int8(*weight)
    rows, columns = weight.weight_packed.shape
    check_bias(bias, rows)
    window.check(x.codes.shape, rows, columns)


#: The same in a convolution, whose channels stand before its sizes.
_BY_CHANNEL = Derivative(
    lambda given, grad: grad.movedim(-1 - len(given[7]), -1),
    lambda given, tangent: tangent.view(-1, *[1] * len(given[7])),
)

_INPUT = "Tensor x, Tensor input_scale, Tensor input_zero_point"
w8a8_linear = register(
    f"w8a8_linear({_INPUT}, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias) -> Tensor",
    _linear,
    _linear_fake,
    derivatives={6: BY_BIAS},
    leading=True,
    autocast_result=True,
)
w4a8_linear = register(
    f"w4a8_linear({_INPUT}, Tensor weight_packed, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
    "int group_size, str compute='auto') -> Tensor",
    _int4_linear,
    _int4_linear_fake,
    derivatives={6: BY_BIAS},
    leading=True,
    autocast_result=True,
)
w8a8_conv = register(
    f"w8a8_conv({_INPUT}, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    _conv,
    _conv_fake,
    derivatives={6: _BY_CHANNEL},
    autocast_result=True,
)
