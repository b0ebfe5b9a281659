"""int4_linear and int8_linear: opcheck clean, equal to F.linear on the dequantized weight, with its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mono_quant_fx import ops
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine
from mono_quant_fx.ops import linear as implementation

#: Largest |op - F.linear(x, dequantized, bias)| for K = 70 and outputs below 32: the same products, summed in another
#: order; for the 16-bit types one unit in the last place of such an output.
ATOL = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 2.0**-6, torch.bfloat16: 2.0**-3}
#: Gradients sum over fewer terms, by the same arithmetic.
GRAD_ATOL = ATOL

N, K, GROUP = 24, 70, 32
SHAPES = [(K,), (5, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)]
dtypes = pytest.mark.parametrize("dtype", list(ATOL), ids=str)
symmetries = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
kinds = pytest.mark.parametrize("kind", ["int4", "int8"])


def case(kind, shape=(5, K), dtype=torch.float32, symmetric=True, bias=True):
    """(op, its arguments, the dequantized weight)."""
    scheme = QuantScheme(4, GROUP, symmetric) if kind == "int4" else QuantScheme(8, -1, symmetric)
    stored = affine.quantize_matrix(torch.randn(N, K).to(dtype), scheme)
    x, b = torch.randn(shape).to(dtype), torch.randn(N).to(dtype) if bias else None
    weight = affine.dequantize_weight(stored, scheme.group_size, K)
    if kind == "int4":
        return ops.int4_linear, (x, *stored, b, GROUP), weight
    return ops.int8_linear, (x, *stored, b), weight


def with_x(args, x):
    return (x, *args[1:])


@kinds
@symmetries
@dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_opcheck(kind, symmetric, dtype, bias):
    op, args, _ = case(kind, dtype=dtype, symmetric=symmetric, bias=bias)
    torch.library.opcheck(op, args)


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_opcheck_for_every_rank_with_gradients(kind, shape):
    op, args, _ = case(kind, shape)
    args[4].requires_grad_()
    torch.library.opcheck(op, with_x(args, args[0].requires_grad_()))


@kinds
@symmetries
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_linear_on_the_dequantized_weight(kind, symmetric, dtype, shape):
    for bias in (True, False):
        op, args, weight = case(kind, shape, dtype, symmetric, bias)
        out = op(*args)
        assert out.dtype == dtype and out.is_contiguous()
        torch.testing.assert_close(out, F.linear(args[0], weight, args[4]), rtol=0, atol=ATOL[dtype])


@kinds
def test_a_strided_input_gives_the_same(kind):
    op, args, weight = case(kind, (6, 4, K))
    x = args[0]
    for strided in (x.transpose(0, 1), x[::2], torch.randn(K, 6).t(), torch.randn(1, 1, K).expand(3, 2, K)):
        assert not strided.is_contiguous()
        expected = F.linear(strided.contiguous(), weight, args[4])
        torch.testing.assert_close(op(*with_x(args, strided)), expected, rtol=0, atol=ATOL[torch.float32])
    torch.library.opcheck(op, with_x(args, x.transpose(0, 1)))


@kinds
def test_x_may_be_of_another_dtype_than_the_scales(kind):
    op, args, weight = case(kind, bias=False)
    x = args[0].bfloat16()
    out = op(*with_x(args, x))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, F.linear(x, weight.bfloat16()), rtol=0, atol=ATOL[torch.bfloat16])
    torch.library.opcheck(op, with_x(args, x.requires_grad_()))


@kinds
@symmetries
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_those_through_the_dequantized_weight(kind, symmetric, dtype, shape):
    op, args, weight = case(kind, shape, dtype, symmetric)
    x, bias = args[0].requires_grad_(), args[4].requires_grad_()
    out = op(*args)
    seed = torch.randn(out.shape).to(dtype)
    actual = torch.autograd.grad(out, (x, bias), seed)
    expected = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), seed)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, e, rtol=0, atol=GRAD_ATOL[dtype])


@kinds
@symmetries
def test_gradcheck_in_float64(kind, symmetric):
    op, args, _ = case(kind, (2, K), torch.float64, symmetric)
    x, bias = args[0].requires_grad_(), args[4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: op(x, *args[1:4], b, *args[5:]), (x, bias))


@kinds
def test_only_what_needs_a_gradient_gets_one(kind):
    op, args, _ = case(kind)
    op(*with_x(args, args[0].requires_grad_())).sum().backward()
    assert args[0].grad is not None and args[4].grad is None
    assert not op(*with_x(args, args[0].detach())).requires_grad


class Watch(TorchDispatchMode):
    """Remembers the largest storage, in elements, among the float tensors that any op returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.itemsize)
        return out


@pytest.mark.parametrize(("kind", "reference"), [("int4", implementation._int4), ("int8", implementation._int8)])
def test_the_float_weight_never_exists_whole(kind, reference, monkeypatch):
    _, args, _ = case(kind, (1, K))
    expected = reference(*args)
    tile = 4 * K
    monkeypatch.setattr(affine, "TILE", tile)
    with Watch() as watch:
        out = reference(*args)
    torch.testing.assert_close(out, expected, rtol=0, atol=ATOL[torch.float32])
    assert K <= watch.largest <= 4 * -(-K // 8) * 8 < N * K  # four rows at a time, padded to whole words


@pytest.mark.parametrize("rows", [1, 5, 23, 24, 25])
def test_the_last_tile_may_be_short(rows, monkeypatch):
    op, args, weight = case("int4")
    monkeypatch.setattr(affine, "TILE", rows * K)
    torch.testing.assert_close(op(*args), F.linear(args[0], weight, args[4]), rtol=0, atol=ATOL[torch.float32])


WRONG = [
    ("int4", 0, torch.tensor(1.0), r"x: a float tensor \[\.\.\., K\] needed, not \(\) of torch.float32"),
    (
        "int4",
        0,
        torch.zeros(2, K, dtype=torch.int64),
        r"x: a float tensor \[\.\.\., K\] needed, not \(2, 70\) of torch.int64",
    ),
    ("int4", 0, torch.zeros(2, 64), "weight_packed has 9 words a row, but 64 columns need 8"),
    ("int4", 2, torch.zeros(N, 2), r"weight_scale is \(24, 2\); group_size=32 needs \(24, 3\)"),
    ("int4", 3, torch.zeros(N, 1, dtype=torch.int8), r"weight_zero_point is not of shape \(24, 3\)"),
    ("int4", 4, torch.zeros(3), r"bias: one value an output channel \(24\) needed"),
    ("int4", 5, 20, "group_size=20: a positive multiple of 8, or -1, needed"),
    ("int8", 0, torch.tensor(1.0), r"x: a float tensor \[\.\.\., K\] needed, not \(\) of torch.float32"),
    ("int8", 0, torch.zeros(2, 64), "x has 64 columns, weight 70"),
    ("int8", 1, torch.zeros(N, K), r"weight: int8 \[N, K\] needed"),
    ("int8", 2, torch.zeros(N), r"weight_scale is \(24,\); \(24, 1\) needed"),
    ("int8", 3, torch.zeros(N, 2, dtype=torch.int8), r"weight_zero_point is not of shape \(24, 1\)"),
    ("int8", 4, torch.zeros(1, N), r"bias: one value an output channel \(24\) needed"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("kind", "at", "value", "words"), WRONG)
def test_wrong_shapes_are_said_by_the_reference_and_by_the_fake(kind, at, value, words, fake):
    op, args, _ = case(kind)
    args = (*args[:at], value, *args[at + 1 :])
    if not fake:
        with pytest.raises(RuntimeError, match=words):
            op(*args)
        return
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match=words):
        op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
