"""QuantizedLinearInt4: the op, the bytes and the numbers of the compiler, for people who swap modules by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx import ops

#: One matrix product in float32, rows summed in another order.
MM_ATOL = 1e-5

CASES = [(True, True), (True, False), (False, True), (False, False)]
cases = pytest.mark.parametrize(("bias", "symmetric"), CASES, ids=lambda v: str(v))


def make(bias=True, symmetric=True, columns=70, group_size=32):
    linear = nn.Linear(columns, 24, bias=bias)
    return linear, mq.QuantizedLinearInt4.from_float(linear, group_size, symmetric)


@cases
def test_forward_is_the_op_on_the_public_bytes(bias, symmetric):
    linear, layer = make(bias, symmetric)
    stored = mq.quantize_weight_int4(linear.weight.detach(), 32, symmetric=symmetric)
    for name, tensor in zip(stored._fields, stored, strict=True):
        assert tensor is None if getattr(layer, name) is None else torch.equal(getattr(layer, name), tensor)
    for shape in ((70,), (5, 70), (2, 3, 70)):
        x = torch.randn(shape)
        assert torch.equal(layer(x), ops.int4_linear(x, *stored, linear.bias, 32))
        torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), linear.bias), rtol=0, atol=MM_ATOL)


def test_the_compiler_gives_the_same_bytes_and_numbers():
    linear = nn.Linear(256, 24).eval()
    layer = mq.QuantizedLinearInt4.from_float(linear)
    gm = mq.quantize(nn.Sequential(linear).eval()).graph_module
    state = gm.state_dict()
    assert torch.equal(state["0.weight_packed"], layer.weight_packed)
    assert torch.equal(state["0.weight_scale"], layer.weight_scale)
    x = torch.randn(3, 256)
    assert torch.equal(gm(x), layer(x))


def test_the_float_layer_stays_as_it_is():
    linear = nn.Linear(64, 24)
    before = {k: v.clone() for k, v in linear.state_dict().items()}
    layer = mq.QuantizedLinearInt4.from_float(linear, 32)
    layer.bias.data.zero_()
    assert all(torch.equal(v, before[k]) for k, v in linear.state_dict().items())
    assert linear.weight.requires_grad and linear.bias.requires_grad
    assert not any(p.requires_grad for p in layer.parameters())


@cases
def test_state_dict_round_trip(bias, symmetric):
    _, layer = make(bias, symmetric)
    torch.manual_seed(1)
    _, other = make(bias, symmetric)
    x = torch.randn(3, 70)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(layer(x), other(x))
    expected = {"weight_packed", "weight_scale"} | ({"bias"} if bias else set())
    assert set(layer.state_dict()) == expected | (set() if symmetric else {"weight_zero_point"})
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@cases
def test_to_float_stands_for_the_same_numbers(bias, symmetric):
    linear, layer = make(bias, symmetric)
    back = layer.to_float()
    assert type(back) is nn.Linear and (back.in_features, back.out_features) == (70, 24)
    assert torch.equal(back.weight, layer.dequantize()) and not torch.equal(back.weight, linear.weight)
    assert (back.bias is None) is (not bias) and (not bias or torch.equal(back.bias, linear.bias))
    x = torch.randn(3, 70)
    torch.testing.assert_close(back(x), layer(x), rtol=0, atol=MM_ATOL)


def test_gradients_reach_what_lies_before():
    _, layer = make()
    x = torch.randn(3, 70, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 70), rtol=0, atol=MM_ATOL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_layer_keeps_the_float_layers_dtype(dtype):
    layer = mq.QuantizedLinearInt4.from_float(nn.Linear(64, 24, dtype=dtype), 32)
    assert layer.weight_scale.dtype == layer.bias.dtype == layer.to_float().weight.dtype == dtype
    assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_it_prints_its_sizes_and_scheme():
    sizes = "in_features=70, out_features=24, bias={}, group_size=32, symmetric={}"
    assert repr(make()[1]) == f"QuantizedLinearInt4({sizes.format(True, True)})"
    assert repr(make(False, False)[1]) == f"QuantizedLinearInt4({sizes.format(False, False)})"


def test_bad_input_is_said_in_words():
    with pytest.raises(mq.ConfigError, match=r"^group_size=20: a group is a positive multiple of 8 columns"):
        mq.QuantizedLinearInt4.from_float(nn.Linear(64, 24), 20)
    linear = nn.Linear(64, 24)
    with torch.no_grad():
        linear.weight[3, 5] = float("nan")
    with pytest.raises(mq.WeightError, match=r"^it holds NaN or infinity"):
        mq.QuantizedLinearInt4.from_float(linear)
    with pytest.raises(ValueError, match=r"^x has 40 columns; in_features is 70"):
        make()[1](torch.randn(2, 40))
