"""NaN, infinity and large numbers in x: the results that the float linear has, in their own row, on every path."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.config import OPERATOR_COMPUTE, QuantScheme
from mono_quant_fx.numerics import affine
from mono_quant_fx.ops import dispatch, native, onednn
from tests.ops.test_static_int8 import linear_case

COMPILED = native.kernels().available[1:]
PATHS = ["torch", *COMPILED]
K, N = 72, 21
NAN, INF = float("nan"), float("inf")
#: (bits, compute, way): a way is asked for where a call would choose between several.
CALLS = [(4, compute, way) for compute in OPERATOR_COMPUTE for way in ("few", "many", "matmul")]
CALLS += [(8, "auto", way) for way in ("many", "matmul")]
#: What int8 and bfloat16 may round away, of |x| |w|.
ROUNDED = 0.02


@pytest.fixture
def use_way(use, monkeypatch):
    """Forces a path and a way; the fixture of all tests undoes the path."""

    def choose(path, way):
        use(path)
        monkeypatch.setattr(dispatch, "choose", lambda call: "many" if call.kernel == dispatch.INT8 else way)

    return choose


def linear(bits, compute, group=40, symmetric=False):
    """(x -> the op's result, the dequantized weight, the bias)."""
    stored = affine.quantize_matrix(torch.randn(N, K), QuantScheme(bits, group if bits == 4 else -1, symmetric))
    weight, bias = affine.dequantize_weight(stored, group if bits == 4 else -1, K), torch.randn(N)
    if bits == 4:
        return lambda x: ops.int4_linear(x, *stored, bias, group, compute), weight, bias
    return lambda x: ops.int8_linear(x, *stored, bias), weight, bias


POISONS = {
    "NaN": lambda row: row.index_fill(0, torch.tensor([37]), NAN),
    "infinity": lambda row: row.index_fill(0, torch.tensor([37]), INF),
    "minus infinity": lambda row: row.index_fill(0, torch.tensor([71]), -INF),
    "both": lambda row: row.index_fill(0, torch.tensor([3]), INF).index_fill(0, torch.tensor([50]), -INF),
    "large": lambda row: row * 1e37,
    "largest": lambda row: torch.zeros_like(row).index_fill(0, torch.tensor([9]), torch.finfo(row.dtype).max / 4),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("bits", "compute", "way"), CALLS)
def test_what_is_not_finite_reaches_what_it_reaches_in_floats(path, bits, compute, way, use_way):
    """Infinity became NaN, rows of INT8 x vanished in NaN, and 1e37 overflowed in sums before their scale came."""
    use_way(path, way)
    for dtype, symmetric in (
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.float16, True),
    ):
        op, weight, bias = linear(bits, compute, symmetric=symmetric)
        for rows in {"few": (1, 3, 12), "many": (6, 40), "matmul": (9,)}[way]:
            clean = torch.randn(rows, K).to(dtype)
            expected_others, at = op(clean), rows // 2
            for name, poison in POISONS.items():
                if dtype == torch.float16 and name.startswith("large"):
                    continue
                x = clean.clone()
                x[at] = poison(x[at])
                assert_as_in_floats(op(x), x, weight, bias, at, expected_others, name)


def assert_as_in_floats(actual, x, weight, bias, at, clean, name):
    others = [i for i in range(len(x)) if i != at]
    assert torch.equal(actual[others], clean[others]), f"{name}: other rows"
    row, expected = actual[at].float(), F.linear(x[at].float(), weight, bias).to(x.dtype).float()
    size = x[at].double().abs() @ weight.double().abs().t() + 1
    near = (row.double() - expected.double()).abs() <= ROUNDED * size
    assert ((row == expected) | (row.isnan() & expected.isnan()) | (expected.isfinite() & near)).all(), name


@pytest.mark.parametrize("path", PATHS)
def test_a_scale_that_is_not_finite_reaches_its_own_outputs(path, use_way):
    use_way(path, "many")
    stored = affine.quantize_matrix(torch.randn(N, K), QuantScheme(4, 24, False))
    stored.weight_scale[3, 1], stored.weight_scale[5, 0] = NAN, INF
    weight = affine.dequantize_weight(stored, 24, K)
    for rows in (2, 12):
        x = torch.randn(rows, K)
        actual, expected = ops.int4_linear(x, *stored, None, 24, "float32"), F.linear(x, weight)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scale = stored.weight_scale.to(dtype)
        expected = affine.dequantize_weight(stored._replace(weight_scale=scale), 24, K)
        actual = ops.dequantize_int4(stored.weight_packed, scale, stored.weight_zero_point, 24, K)
        assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.isinf(), expected.isinf())


def test_rounding_to_bfloat16_makes_no_infinity():
    x = torch.tensor([1.0, 3.4e38, -3.4e38, INF, NAN])
    assert x[1].bfloat16().isinf()
    rounded = affine.round_to_bfloat16(x)
    assert torch.equal(rounded.isinf(), x.isinf()) and rounded[4].isnan() and rounded[0] == 1


def test_int8_rounding_leaves_a_group_with_infinity_as_it_is():
    x = torch.tensor([[1.0, INF, 0.25, 0.1], [1.0, NAN, 0.25, 0.1]])
    rounded = affine.round_activations(x, 2)
    assert torch.equal(rounded[:, :2].nan_to_num(7), x[:, :2].nan_to_num(7))
    assert rounded[0, 2:].tolist() == pytest.approx([0.25, 0.1], abs=0.001)
    far = torch.tensor([[1e300, 1e299]], dtype=torch.float64)  # beyond float32
    torch.testing.assert_close(affine.round_activations(far, -1), far, rtol=0.03, atol=0)


# ---- INT8 activations: codes have no NaN


def test_nan_becomes_no_code():
    """It became 0 or another code, by the compiler's mood, and the row looked like a result."""
    scale, zero_point = torch.tensor([0.1]), torch.tensor([5], dtype=torch.int8)
    x = torch.tensor([[1.0, INF, -INF], [1e30, 2.0, 3.0]])
    assert ops.quantize_activation(x, scale, zero_point).tolist() == [[15, 127, -128], [127, 25, 35]]
    x[1, 2] = NAN
    words = r"the tensor \(2, 3\) holds NaN at 1 of 6 places, the first at \[1, 2\]; no INT8 code stands for NaN: mask"
    with pytest.raises(mq.InputError, match=words):
        ops.quantize_activation(x, scale, zero_point)


def test_nan_in_a_graph_with_int8_activations_is_refused():
    model, x = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(60, 32)
    gm = mq.quantize(
        model, calibration_data=[x], bits=8, activations="int8", skip_param_threshold=0, accuracy_warning="ignore"
    ).graph_module
    x[3, 4] = NAN
    with pytest.raises(mq.InputError, match=r"first at \[3, 4\]"):
        gm(x)


def test_sums_that_an_int32_may_not_hold_are_not_made_there():
    """255 * 127 summed 70,000 times is past 2^31: the result came out with the other sign."""
    onednn._say.cache_clear()
    columns = onednn.LONGEST + 1
    x, codes = (torch.full((n, columns), 127, dtype=torch.int8) for n in (2, 8))
    scale, zero_point = torch.tensor([0.01]), torch.tensor([-128], dtype=torch.int8)
    with pytest.warns(UserWarning, match="more than 65793 products may overflow"):
        out = ops.w8a8_linear(x, scale, zero_point, codes, torch.full((8, 1), 0.01), None, None)
    torch.testing.assert_close(out, torch.full((2, 8), 255 * 127 * columns * 1e-4), rtol=1e-4, atol=0)
    onednn._say.cache_clear()


@pytest.mark.parametrize("path", PATHS)
def test_a_large_weight_scale_meets_a_small_input_scale(path, use_way):
    use_way(path, "many")
    x, _, zero_point, packed, scale, zero, _ = linear_case(bits=4)
    scale, input_scale = scale * 1e36, torch.tensor([1e-6])
    actual = ops.w4a8_linear(x, input_scale, zero_point, packed, scale, zero, None, 32)
    expected = F.linear(
        ops.dequantize_activation(x, input_scale, zero_point), ops.dequantize_int4(packed, scale, zero, 32, 70)
    )
    assert expected.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(expected.abs().max()) * 0.01)
