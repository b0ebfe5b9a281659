"""Under autocast linears on codes give what linears give, and no op is changed from inside."""

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx import numerics, ops
from mono_quant_fx.config import INT8
from tests.ops.test_static_int8 import linear_case


def int4(linear):
    packed = mq.QuantizedLinearInt4.from_float(linear, 32)
    return lambda x, dtype: ops.int4_linear(
        x, packed.weight_packed, packed.weight_scale, None, packed.bias.to(dtype), 32
    )


def int8(linear):
    stored = numerics.quantize_matrix(linear.weight.detach(), INT8)
    return lambda x, dtype: ops.int8_linear(x, *stored, linear.bias.detach().to(dtype))


@pytest.mark.parametrize("make", [int4, int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_casts_its_input_and_bias(make, dtype):
    linear, x = nn.Linear(64, 24), torch.randn(3, 64, requires_grad=True)
    op = make(linear)
    expected = op(x.to(dtype), dtype)
    with torch.autocast("cpu", dtype):
        actual = op(x, torch.float32)
        assert actual.dtype == linear(x).dtype == dtype
    assert torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(actual.float().sum(), x)
    assert gradient.dtype == torch.float32 and gradient.abs().max() > 0


def test_float64_stays_float64():
    linear = nn.Linear(64, 24).double()
    packed = mq.QuantizedLinearInt4.from_float(linear, 32)
    x = torch.randn(3, 64, dtype=torch.float64)
    expected = packed(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.float64
        assert torch.equal(packed(x), expected)


@pytest.mark.filterwarnings("ignore:INT8 activations run through float")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ops_on_int8_inputs_keep_their_own_types(bits, symmetric):
    case = linear_case(bits=bits, symmetric=symmetric)
    call = (lambda: ops.w4a8_linear(*case, 32)) if bits == 4 else (lambda: ops.w8a8_linear(*case))
    expected = call()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(), expected)
