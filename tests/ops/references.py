"""Each operator's reference: plain torch, on any device."""

from mono_quant_fx import ops
from mono_quant_fx.ops import activation, dequantize, linear, static_int8

REFERENCES = {
    ops.int4_linear: linear._int4,
    ops.int8_linear: linear._int8,
    ops.dequantize_int4: dequantize._int4,
    ops.dequantize_int8: dequantize._int8,
    ops.quantize_activation: activation._quantize,
    ops.dequantize_activation: activation._dequantize,
    ops.w8a8_linear: static_int8._linear,
    ops.w4a8_linear: static_int8._int4_linear,
    ops.w8a8_conv: static_int8._conv,
}
