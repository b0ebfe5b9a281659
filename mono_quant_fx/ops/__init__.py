"""The operators: each in one file with schema, reference, fake and gradient; importing this package registers them."""

from mono_quant_fx.ops.dequantize import dequantize_int4, dequantize_int8
from mono_quant_fx.ops.linear import int4_linear, int8_linear
from mono_quant_fx.ops.registry import is_ours

__all__ = ["dequantize_int4", "dequantize_int8", "int4_linear", "int8_linear", "is_ours"]
