"""INT8 activations: the equations, opcheck, and oneDNN's kernels against the reference and against integer sums."""

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mono_quant_fx import ops
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine
from mono_quant_fx.ops import onednn, static_int8
from mono_quant_fx.ops.activation import Codes

#: KERNEL_TOLERANCE of docs/numerics.md: |kernel - reference| over max|reference|. float32: exact sums, then the
#: rounding of two products; the 16-bit types: one unit in the last place.
KERNEL_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
dtypes = pytest.mark.parametrize("dtype", list(KERNEL_TOLERANCE), ids=str)
symmetries = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])

CONVS = {  # dims, channels, out, kernel, stride, padding, dilation, groups
    "plain": (2, 8, 12, 3, 1, 1, 1, 1),
    "strided": (2, 8, 12, 3, 2, 1, 1, 1),
    "depthwise": (2, 16, 16, 3, 1, 1, 1, 16),
    "grouped, dilated": (2, 8, 12, 3, 1, 2, 2, 4),
    "1 x 1": (2, 8, 12, 1, 1, 0, 1, 1),
    "1-D": (1, 6, 10, 5, 1, 2, 1, 1),
    "3-D": (3, 4, 6, 3, 1, 1, 1, 2),
}
convs = pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)


def qparams(scale=0.031, zero_point=-17, dtype=torch.float32):
    return torch.tensor([scale]).to(dtype), torch.tensor([zero_point], dtype=torch.int8)


def linear_case(shape=(5, 70), rows=24, dtype=torch.float32, symmetric=True, bias=True, bits=8):
    torch.manual_seed(0)
    scheme = QuantScheme(8, -1, symmetric) if bits == 8 else QuantScheme(4, 32, symmetric)
    weight = affine.quantize_matrix(torch.randn(rows, shape[-1]).to(dtype), scheme)
    x = torch.randint(-128, 128, shape, dtype=torch.int8)
    return x, *qparams(dtype=dtype), *weight, torch.randn(rows).to(dtype) if bias else None


def conv_case(conv, dtype=torch.float32, symmetric=True, batch=(2,)):
    torch.manual_seed(0)
    dims, channels, out, kernel, *window, groups = conv
    columns = channels // groups * kernel**dims
    weight = affine.quantize_matrix(torch.randn(out, columns).to(dtype), QuantScheme(8, -1, symmetric))
    x = torch.randint(-128, 128, (*batch, channels, *(9, 8, 7)[:dims]), dtype=torch.int8)
    geometry = [[kernel] * dims, *([n] * dims for n in window), groups]
    return x, *qparams(dtype=dtype), *weight, torch.randn(out).to(dtype), *geometry


def relative_error(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max())


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.floats(2**-20, 2**20, width=32), st.integers(-128, 127), st.integers(0, 2**31))
def test_quantize_is_the_affine_map_and_dequantize_its_inverse(scale, zero_point, seed):
    x = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * scale * 100
    s, z = qparams(scale, zero_point)
    codes = ops.quantize_activation(x, s, z)
    assert codes.tolist() == [max(-128, min(127, round(v) + zero_point)) for v in (x / scale).tolist()]
    values = ops.dequantize_activation(codes, s, z)
    assert values.tolist() == ((codes.float() - zero_point) * torch.tensor(scale)).tolist()
    assert torch.equal(ops.quantize_activation(values, s, z), codes)


@dtypes
def test_dequantize_gives_the_scales_dtype(dtype):
    s, z = qparams(dtype=dtype)
    x = torch.randn(3, 4).to(dtype)
    codes = ops.quantize_activation(x, s, z)
    assert codes.dtype is torch.int8 and ops.dequantize_activation(codes, s, z).dtype is dtype
    torch.library.opcheck(ops.quantize_activation, (x, s, z))
    torch.library.opcheck(ops.dequantize_activation, (codes, s, z))


@dtypes
@symmetries
@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck_linear(bits, symmetric, dtype):
    args = linear_case((2, 3, 70), dtype=dtype, symmetric=symmetric, bits=bits)
    torch.library.opcheck(ops.w8a8_linear if bits == 8 else ops.w4a8_linear, args if bits == 8 else (*args, 32))


@convs
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batched", "single"])
def test_opcheck_conv(conv, batch):
    torch.library.opcheck(ops.w8a8_conv, conv_case(conv, batch=batch))


def test_linear_is_the_integer_sum_scaled_once():
    x, scale, zero_point, codes, weight_scale, _, bias = linear_case()
    sums = (x.long() - zero_point.long()) @ codes.long().T
    expected = sums.double() * scale.double() * weight_scale.double().T + bias.double()
    assert relative_error(ops.w8a8_linear(*linear_case()), expected.float()) <= KERNEL_TOLERANCE[torch.float32]


@pytest.fixture
def kernels():
    """Skips where a machine has none: there the op is the reference itself."""
    if onednn._missing() is not None:
        pytest.skip(onednn._missing())


@dtypes
@pytest.mark.parametrize("shape", [(1, 64), (5, 70), (64, 64), (2, 3, 384)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_the_linear_kernel_equals_the_reference(kernels, shape, bias, dtype):
    args = linear_case(shape, 64, dtype, bias=bias)
    x, weight = Codes(*args[:3]), affine.QuantizedWeight(*args[3:6])
    assert onednn.can_run(x, weight)
    expected = static_int8.reference_linear(x, weight, args[6])
    assert relative_error(ops.w8a8_linear(*args), expected) <= KERNEL_TOLERANCE[dtype]


@dtypes
@convs
def test_the_conv_kernel_equals_the_reference(kernels, conv, dtype):
    args = conv_case(conv, dtype)
    x, weight = Codes(*args[:3]), affine.QuantizedWeight(*args[3:6])
    assert onednn.can_run(x, weight)
    expected = static_int8.reference_conv(x, weight, args[6], onednn.Window(*args[7:]))
    assert relative_error(ops.w8a8_conv(*args), expected) <= KERNEL_TOLERANCE[dtype]


@convs
def test_the_conv_reference_is_a_convolution_of_what_the_codes_stand_for(conv):
    args = conv_case(conv, symmetric=False)
    values = ops.dequantize_activation(*args[:3])
    _, channels, out, kernel, stride, padding, dilation, groups = conv
    size = (out, channels // groups, *[kernel] * (values.dim() - 2))
    weight = affine.dequantize(args[3], args[4], args[5], -1).view(size)
    plain = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[values.dim()]
    expected = plain(values, weight, args[6], stride, padding, dilation, groups)
    actual = ops.w8a8_conv(*args)
    assert relative_error(actual, expected) <= KERNEL_TOLERANCE[torch.float32]
    assert actual.is_contiguous()


def test_int4_weights_are_int4_linear_on_what_the_codes_stand_for():
    args = (*linear_case(bits=4, symmetric=False), 32)
    expected = ops.int4_linear(ops.dequantize_activation(*args[:3]), *args[3:])
    assert relative_error(ops.w4a8_linear(*args), expected) <= KERNEL_TOLERANCE[torch.float32]


def test_no_rows_and_float64_take_the_reference():
    assert ops.w8a8_linear(*linear_case((0, 70))).shape == (0, 24)
    args = linear_case(dtype=torch.float64)
    out = ops.w8a8_linear(*args)
    assert out.dtype is torch.float64
    expected = F.linear(ops.dequantize_activation(*args[:3]), ops.dequantize_int8(*args[3:6]), args[6])
    torch.testing.assert_close(out, expected)


def test_a_weight_that_is_written_into_is_packed_anew(kernels):
    args = linear_case()
    ops.w8a8_linear(*args)
    args[3].zero_()
    assert torch.equal(ops.w8a8_linear(*args), args[6].expand(5, -1))


def test_an_inference_tensor_is_packed_at_each_call(kernels):
    with torch.inference_mode():
        args = linear_case()
        before = ops.w8a8_linear(*args)
        args[3].zero_()
        assert not torch.equal(ops.w8a8_linear(*args), before)


def test_the_packed_copy_goes_with_its_weight(kernels):
    args = linear_case()
    ops.w8a8_linear(*args)
    twin = copy.deepcopy(args[3])
    ops.w8a8_linear(*args[:3], twin, *args[4:])
    gc.collect()
    kept = len(onednn._PACKED)
    del twin
    gc.collect()
    assert len(onednn._PACKED) == kept - 1


@pytest.mark.parametrize("why", ["this build of torch has no oneDNN", "this CPU has no VNNI instructions"])
def test_a_slower_path_is_said_once(monkeypatch, why):
    monkeypatch.setattr(onednn, "_missing", lambda: why)
    onednn._say.cache_clear()
    args = linear_case()
    with pytest.warns(UserWarning, match=f"INT8 activations run through float matmuls, which is slower: {why}"):
        slow = ops.w8a8_linear(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.w8a8_linear(*args), slow)
    expected = static_int8.reference_linear(Codes(*args[:3]), affine.QuantizedWeight(*args[3:6]), args[6])
    assert torch.equal(slow, expected)
    onednn._say.cache_clear()


BAD = {
    "x: int8 codes needed, not torch.float32": lambda a: (a[0].float(), *a[1:]),
    r"input_scale: a float tensor of shape \(1,\) needed": lambda a: (a[0], a[1][0], *a[2:]),
    r"input_zero_point: int8 of shape \(1,\) needed": lambda a: (*a[:2], a[2].int(), *a[3:]),
    "70 columns needed": lambda a: (a[0][:, :-1], *a[1:]),
    r"bias: one value an output channel \(24\) needed": lambda a: (*a[:6], a[6][:-1]),
}


@pytest.mark.parametrize("words", BAD)
def test_wrong_arguments_are_named(words):
    with pytest.raises(RuntimeError, match=words):
        ops.w8a8_linear(*BAD[words](linear_case()))


def test_a_conv_of_other_channels_is_refused():
    args = conv_case(CONVS["plain"])
    with pytest.raises(RuntimeError, match=r"so rows of 63 are needed, not 72"):
        ops.w8a8_conv(args[0][:, :7], *args[1:])
