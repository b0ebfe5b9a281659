"""The operators: schema, reference, fake and gradient of each stand together; importing this package registers them."""

from mono_quant_fx.ops.activation import dequantize_activation, quantize_activation
from mono_quant_fx.ops.dequantize import dequantize_int4, dequantize_int8
from mono_quant_fx.ops.linear import int4_linear, int8_linear
from mono_quant_fx.ops.registry import is_ours
from mono_quant_fx.ops.static_int8 import w4a8_linear, w8a8_conv, w8a8_linear

__all__ = [
    "dequantize_activation",
    "dequantize_int4",
    "dequantize_int8",
    "int4_linear",
    "int8_linear",
    "is_ours",
    "quantize_activation",
    "w4a8_linear",
    "w8a8_conv",
    "w8a8_linear",
]
