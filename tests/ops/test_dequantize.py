"""dequantize_int4 and dequantize_int8 as operators: opcheck clean, equal to the oracle, errors in words."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mono_quant_fx import ops
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
symmetries = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def weight(dtype=torch.float32, n=12, k=70):
    return torch.randn(n, k).to(dtype)


def int4(dtype, symmetric, group_size=32, k=70):
    scheme = QuantScheme(4, group_size, symmetric)
    w = weight(dtype, k=k)
    return w, scheme, (*affine.quantize_matrix(w, scheme), group_size, k)


def int8(dtype, symmetric):
    scheme = QuantScheme(8, -1, symmetric)
    w = weight(dtype)
    return w, scheme, tuple(affine.quantize_matrix(w, scheme))


@dtypes
@symmetries
def test_opcheck(dtype, symmetric):
    torch.library.opcheck(ops.dequantize_int4, int4(dtype, symmetric)[2])
    torch.library.opcheck(ops.dequantize_int4, int4(dtype, symmetric, -1)[2])
    torch.library.opcheck(ops.dequantize_int8, int8(dtype, symmetric)[2])


@dtypes
@symmetries
@pytest.mark.parametrize(("group_size", "k"), [(8, 64), (32, 70), (128, 70), (64, 1), (-1, 33)])
def test_int4_is_the_fake_quantized_weight_to_the_bit(dtype, symmetric, group_size, k):
    w, scheme, args = int4(dtype, symmetric, group_size, k)
    out = ops.dequantize_int4(*args)
    assert torch.equal(out, affine.fake_quantize(w, scheme))
    assert out.dtype == dtype and out.is_contiguous()


@dtypes
@symmetries
def test_int8_is_the_fake_quantized_weight_to_the_bit(dtype, symmetric):
    w, scheme, args = int8(dtype, symmetric)
    out = ops.dequantize_int8(*args)
    assert torch.equal(out, affine.fake_quantize(w, scheme)) and out.dtype == dtype


def test_strided_storage_reads_the_same():
    _, _, (packed, scale, zero_point, *rest) = int4(torch.float32, False)
    strided = [t.t().contiguous().t() for t in (packed, scale, zero_point)]
    assert not strided[0].is_contiguous()
    assert torch.equal(ops.dequantize_int4(*strided, *rest), ops.dequantize_int4(packed, scale, zero_point, *rest))


def test_the_storage_stays_as_it_is():
    for args, op in (
        (int4(torch.float32, False)[2], ops.dequantize_int4),
        (int8(torch.float32, False)[2], ops.dequantize_int8),
    ):
        before = [t.clone() for t in args[:3]]
        op(*args).fill_(1.0)
        assert all(torch.equal(a, b) for a, b in zip(args[:3], before, strict=True))


def packed_with(**changes):
    names = ("weight_packed", "weight_scale", "weight_zero_point", "group_size", "in_features")
    return tuple({**dict(zip(names, int4(torch.float32, False)[2], strict=True)), **changes}.values())


def int8_with(**changes):
    names = ("weight", "weight_scale", "weight_zero_point")
    return tuple({**dict(zip(names, int8(torch.float32, False)[2], strict=True)), **changes}.values())


WRONG = [
    (
        ops.dequantize_int4,
        packed_with(weight_packed=torch.zeros(12, 9)),
        r"weight_packed: int32 \[N, ceil\(K/8\)\] needed",
    ),
    (
        ops.dequantize_int4,
        packed_with(weight_packed=torch.zeros(9, dtype=torch.int32)),
        r"weight_packed: int32 \[N, ceil",
    ),
    (ops.dequantize_int4, packed_with(in_features=73), "weight_packed has 9 words a row, but 73 columns need 10"),
    (ops.dequantize_int4, packed_with(group_size=64), r"weight_scale is \(12, 3\); group_size=64 needs \(12, 2\)"),
    (ops.dequantize_int4, packed_with(group_size=0), "group_size=0: a positive multiple of 8, or -1, needed"),
    (ops.dequantize_int4, packed_with(group_size=35), "group_size=35: a positive multiple of 8, or -1, needed"),
    (
        ops.dequantize_int4,
        packed_with(weight_zero_point=torch.zeros(12, 1, dtype=torch.int8)),
        r"weight_zero_point is not of shape \(12, 3\)",
    ),
    (ops.dequantize_int8, int8_with(weight=torch.zeros(12, 70, dtype=torch.int32)), r"weight: int8 \[N, K\] needed"),
    (ops.dequantize_int8, int8_with(weight_scale=torch.ones(12)), r"weight_scale is \(12,\); \(12, 1\) needed"),
    (
        ops.dequantize_int8,
        int8_with(weight_zero_point=torch.zeros(3, 1, dtype=torch.int8)),
        r"weight_zero_point is not of shape \(12, 1\)",
    ),
]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("op", "args", "words"), WRONG)
def test_wrong_shapes_are_said_by_the_reference_and_by_the_fake(op, args, words, fake):
    if not fake:
        with pytest.raises(RuntimeError, match=words):
            op(*args)
        return
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match=words):
        op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))


def test_names_live_in_the_projects_namespace():
    for name in ("dequantize_int4", "dequantize_int8", "int4_linear", "int8_linear"):
        op = getattr(torch.ops.mono_quant_fx, name).default
        assert op is getattr(ops, name) and ops.is_ours(op)
    assert not ops.is_ours(torch.ops.aten.linear.default) and not ops.is_ours(torch.add)
