"""Calls every operator with arguments that a stranger may have written: python -m tests.ops.hostile_calls SEED COUNT.

A call may give a tensor or raise; a signal ends the process, which is what the test looks for. What it gives has the
shape and type that the fake implementation tells, and the reference's values.
"""

import random
import sys
import warnings

import torch

from mono_quant_fx import ops
from mono_quant_fx.config import OPERATOR_COMPUTE, QuantScheme
from mono_quant_fx.numerics import affine
from tests.ops.references import REFERENCES

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NUMBERS = [-(2**63), -(2**31), -8, -1, 0, 1, 2, 3, 7, 8, 16, 24, 40, 64, 1000, 2**20, 2**31, 2**40, 2**62, 2**63 - 8]
#: Elements of a result that a call here may make.
LARGEST = 1 << 22


def stored(draw, bits, rows, columns, group):
    scheme = QuantScheme(bits, group if bits == 4 else -1, draw.random() < 0.5)
    groups = affine.num_groups(columns, scheme.group_size)
    if bits == 4:
        packed = torch.randint(-(2**31), 2**31, (rows, -(-columns // 8)), dtype=torch.int32)
    else:
        packed = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    zero = None if scheme.symmetric else torch.randint(-128, 128, (rows, groups), dtype=torch.int8)
    return packed, torch.rand(rows, groups).to(draw.choice(FLOATS)), zero


def call(draw):
    """(op, arguments that belong together)."""
    op = getattr(ops, draw.choice([name for name in ops.__all__ if name != "is_ours"]))
    name = op.name().partition("::")[2]
    rows, columns, batch = (draw.choice([0, 1, 2, 5, 8, 17, 40]) for _ in range(3))
    group, dtype = draw.choice([-1, 8, 16, 24, 64, 1024, 2**40, 2**62]), draw.choice(FLOATS)
    bias = torch.randn(rows).to(draw.choice(FLOATS)) if draw.random() < 0.5 else None
    qparams = torch.rand(1).to(dtype), torch.randint(-128, 128, (1,), dtype=torch.int8)
    weight = stored(draw, 4 if "4" in name.partition("a8")[0] else 8, rows, columns, group)
    if name in ("quantize_activation", "dequantize_activation"):
        x = torch.randn(batch, columns).to(dtype)
        return op, [x if name[0] == "q" else x.to(torch.int8), *qparams]
    if name.startswith("dequantize"):
        return op, [*weight, *([group, columns] if name.endswith("4") else [])]
    if name == "w8a8_conv":
        return op, conv_arguments(draw, qparams)
    x = torch.randn(batch, columns).to(dtype)
    tail = [group, draw.choice(OPERATOR_COMPUTE)] if "4" in name.partition("a8")[0] else []
    return op, [*([x] if name.startswith("int") else [x.to(torch.int8), *qparams]), *weight, bias, *tail]


def conv_arguments(draw, qparams):
    dims, groups = draw.choice([1, 2, 3]), draw.choice([1, 2, 3])
    channels, rows, kernel = groups * draw.choice([0, 1, 4]), groups * draw.choice([0, 1, 5]), draw.choice([1, 2, 3])
    x = torch.randint(-128, 128, (draw.choice([0, 1, 2]), channels, *[draw.choice([0, 3, 9])] * dims))
    weight = stored(draw, 8, rows, channels // groups * kernel**dims, -1)
    window = [[kernel] * dims, *([n] * dims for n in (draw.choice([1, 2, 50]), draw.choice([0, 1, 9]), 1)), groups]
    return [x.to(torch.int8), *qparams, *weight, torch.randn(rows), *window]


def mutated(draw, value):
    """Something else in the place of an argument."""
    if isinstance(value, torch.Tensor):
        return draw.choice(TENSORS)(draw, value)
    if isinstance(value, list):
        return draw.choice([[], value * 2, [draw.choice(NUMBERS)] * len(value), [draw.choice(NUMBERS), *value[1:]]])
    return "int3" if isinstance(value, str) else draw.choice(NUMBERS) if isinstance(value, int) else torch.zeros(3)


def emptied(draw, t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


TENSORS = [
    lambda draw, t: t.to(draw.choice([*FLOATS, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64])),
    lambda draw, t: t.t() if t.dim() == 2 else t.flatten(),
    lambda draw, t: t.t().contiguous().t() if t.dim() == 2 else t[..., ::2],
    lambda draw, t: t[:1].expand(draw.choice([0, 1, 3, 40, 2**33]), *t.shape[1:]) if t.dim() and len(t) else t,
    lambda draw, t: t[:0],
    lambda draw, t: t[..., :-1] if t.dim() and t.shape[-1] else t,
    lambda draw, t: t.unsqueeze(0),
    lambda draw, t: t.new_zeros(()),
    lambda draw, t: t.to("meta"),
    lambda draw, t: t.new_zeros(draw.choice([0, 1, 8]), draw.choice([0, 1, 8])),
    lambda draw, t: t.as_strided(t.shape, [0] * t.dim()) if t.numel() else t,
    lambda draw, t: t.to_sparse() if t.dim() else t,
    lambda draw, t: (
        torch.full_like(t, draw.choice([float("nan"), float("inf"), -1.0, 0.0, 6e4])) if t.is_floating_point() else t
    ),
    emptied,
]


def fake(op, arguments):
    """What the fake implementation gives for shapes and types; None where it raises."""
    try:
        return op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    except Exception:
        return None


def check(op, arguments, shown):
    like = fake(op, arguments)
    if like is not None and like.numel() > LARGEST:
        return "too large"
    try:
        out = op(*arguments)
    except Exception as e:
        return type(e).__name__
    assert out.is_meta == all(a.is_meta for a in arguments if isinstance(a, torch.Tensor)), shown
    assert (out.shape, out.dtype) == (like.shape, like.dtype), shown
    if op in REFERENCES and not out.is_meta:
        expected = REFERENCES[op](*arguments).double()
        size = expected[expected.isfinite()].abs().sum() + 1
        assert torch.allclose(out.double(), expected, rtol=0.02, atol=0.02 * float(size), equal_nan=True), shown
    return "a tensor"


def main(seed, count):
    draw, seen = random.Random(seed), {}
    torch.manual_seed(seed)
    warnings.simplefilter("ignore")
    for i in range(count):
        op, arguments = call(draw)
        for at in draw.sample(range(len(arguments)), draw.choice([0, 1, 1, 2])):
            arguments[at] = mutated(draw, arguments[at])
        shown = f"{i}: {op} {[(tuple(a.shape), a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments]}"
        if len(sys.argv) > 3:
            print(shown, flush=True)
        got = check(op, arguments, shown)
        seen[got] = seen.get(got, 0) + 1
    print(seen)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
