"""Quantized layers for people who swap modules by hand; the compiler itself never makes one."""

from __future__ import annotations

from torch import Tensor, nn

from mono_quant_fx import ops
from mono_quant_fx.numerics import affine


class QuantizedLinearInt4(nn.Module):
    """A linear layer on packed INT4 weights: the op, the bytes and the numbers that the compiler emits.

    Buffers: weight_packed int32 [N, ceil(K/8)], weight_scale [N, G], weight_zero_point int8 [N, G] or None; bias [N].

    >>> linear = nn.Linear(256, 64)
    >>> QuantizedLinearInt4.from_float(linear, group_size=64)
    QuantizedLinearInt4(in_features=256, out_features=64, bias=True, group_size=64, symmetric=True)
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, stored: affine.QuantizedWeight, in_features: int, group_size: int, bias: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features, self.group_size = (
            in_features,
            stored.weight_packed.shape[0],
            group_size,
        )
        for name, tensor in zip(stored._fields, stored, strict=True):
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def from_float(cls, linear: nn.Linear, group_size: int = 128, symmetric: bool = True) -> QuantizedLinearInt4:
        """Rounds a float layer; it is not touched.

        Raises:
            ConfigError: a bad group_size. WeightError: NaN or infinity in the weight.
        """
        stored = affine.quantize_weight_int4(linear.weight.detach(), group_size, 0, symmetric)
        return cls(stored, linear.in_features, group_size, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype.

        Raises:
            ValueError: x has another number of columns.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} columns; in_features is {self.in_features}")
        return ops.int4_linear(
            x, self.weight_packed, self.weight_scale, self.weight_zero_point, self.bias, self.group_size
        )

    def dequantize(self) -> Tensor:
        """The float weight [N, K] that the codes stand for, in the scale's dtype."""
        stored = affine.QuantizedWeight(self.weight_packed, self.weight_scale, self.weight_zero_point)
        return affine.dequantize_weight(stored, self.group_size, self.in_features)

    def to_float(self) -> nn.Linear:
        """A float layer with the dequantized weight."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, symmetric={self.weight_zero_point is None}"
        )
