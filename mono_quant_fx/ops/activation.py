"""quantize_activation and dequantize_activation: a tensor to INT8 codes under one scale, and back.

    q = clamp(round(x / scale) + zero_point, -128, 127)        x' = scale * (q - zero_point)

(arXiv 1712.05877, eq. 1). scale [1] is in the model's dtype, zero_point [1] is int8, and both are fixed: static.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mono_quant_fx.errors import InputError
from mono_quant_fx.numerics.affine import code_range
from mono_quant_fx.ops import forking
from mono_quant_fx.ops.operands import FLOATS, check_places
from mono_quant_fx.ops.registry import register

QMIN, QMAX = code_range(8)


class Codes(NamedTuple):
    """A quantized activation: int8 codes of any shape, scale [1] and zero_point int8 [1]."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def check(self, **others: Tensor | None) -> None:
        """Raises RuntimeError unless shapes, dtypes and places, that of `others` too, are as they should be."""
        check_places(x=self.codes, input_scale=self.scale, input_zero_point=self.zero_point, **others)
        torch._check(self.codes.dtype == torch.int8, lambda: f"x: int8 codes needed, not {self.codes.dtype}")
        check_qparams(self.scale, self.zero_point)

    def values(self, dtype: torch.dtype) -> Tensor:
        """scale * (q - zero_point), in `dtype`."""
        scale, zero_point = self.scale[0].to(dtype), self.zero_point[0].to(dtype)  # so that codes may be 0-d
        return (self.codes.to(dtype) - zero_point) * scale


def check_qparams(scale: Tensor, zero_point: Tensor) -> None:
    """Raises RuntimeError unless scale is float [1] and zero_point int8 [1]."""
    torch._check(
        tuple(scale.shape) == (1,) and scale.dtype in FLOATS,
        lambda: f"input_scale: a float tensor of shape (1,) needed, not {tuple(scale.shape)} of {scale.dtype}",
    )
    torch._check(
        tuple(zero_point.shape) == (1,) and zero_point.dtype == torch.int8,
        lambda: f"input_zero_point: int8 of shape (1,) needed, not {tuple(zero_point.shape)} of {zero_point.dtype}",
    )


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Infinities are clipped like all that is out of range; NaN is an InputError on a CPU, and elsewhere becomes 0."""
    _check_float(x, scale, zero_point)
    forking.settle()
    codes = x.float() / scale[0].float()  # float32: a half type has too few bits for a code of 8
    if x.device.type != "cpu":
        codes.nan_to_num_(nan=0.0)  # asking whether there is one would wait for the device
    codes.round_().add_(zero_point[0]).clamp_(QMIN, QMAX)
    if x.device.type == "cpu" and bool(codes.sum().isnan()):  # what was clipped has a finite sum
        raise InputError(_where_nan(codes, x))
    return codes.to(torch.int8)


def _where_nan(codes: Tensor, x: Tensor) -> str:
    count, first = int(codes.isnan().sum()), codes.isnan().nonzero()[0].tolist()
    cause = "the tensor" if bool(x.isnan().any()) else "its quotient by input_scale"
    return (
        f"quantize_activation: {cause} {tuple(x.shape)} holds NaN at {count} of {x.numel()} places, "
        f"the first at {first}; no INT8 code stands for NaN: mask those values before the model (torch.nan_to_num), "
        "or keep this input float (activations=None)"
    )


def _quantize_fake(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    _check_float(x, scale, zero_point)
    return torch.empty_like(x, dtype=torch.int8)


def _check_float(x: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    check_places(x=x, input_scale=scale, input_zero_point=zero_point)
    torch._check(x.dtype in FLOATS, lambda: f"x: a float tensor needed, not {x.dtype}")
    check_qparams(scale, zero_point)


def _dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    quantized = Codes(x, scale, zero_point)
    quantized.check()
    forking.settle()
    return quantized.values(scale.dtype)


def _dequantize_fake(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    Codes(x, scale, zero_point).check()
    return torch.empty_like(x, dtype=scale.dtype)


quantize_activation = register(
    "quantize_activation(Tensor x, Tensor input_scale, Tensor input_zero_point) -> Tensor",
    _quantize,
    _quantize_fake,
    derivatives=None,
    leading=True,
)
dequantize_activation = register(
    "dequantize_activation(Tensor x, Tensor input_scale, Tensor input_zero_point) -> Tensor",
    _dequantize,
    _dequantize_fake,
    derivatives={},
    leading=True,
)
