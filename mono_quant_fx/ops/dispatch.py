"""The ways of int4_linear and int8_linear on a CPU, and which one a call takes.

few      the kernel unpacks codes in registers, and multiplies along the rows of the weight      (INT4 only)
many     the kernel unpacks codes into a panel that stays in L1 (INT8: in registers)
matmul   a tile of weight rows is dequantized into a scratch that stays in L2, and torch multiplies

What is fastest depends on the machine, so the first call of a class of shapes runs each way that may be, a few times,
and the class keeps the best. Ways differ by rounding: with torch.use_deterministic_algorithms(True) nothing is timed,
and the choice follows from the number of rows alone.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mono_quant_fx.numerics import affine
from mono_quant_fx.numerics.affine import QuantizedWeight
from mono_quant_fx.ops import forking, native
from mono_quant_fx.ops.operands import check_places

#: Rows of x up to which the first way is always taken, and from which on it never is.
ALWAYS_FEW, NEVER_FEW = 4, 33
#: Rows of x from which torch's matmul is a candidate, and from which on INT8 in registers is none.
MATMUL, NEVER_REGISTERS = 9, 513
#: A later way must be this much faster than an earlier one, so that chance decides little.
MARGIN = 0.95
REPEATS = 3
#: Bytes of the scratch of a tile: the L2 of two cores. Half as much makes torch's matmul a tenth slower.
SCRATCH = 1 << 21

#: The kernel that rounds x to INT8 itself; it has one way.
INT8 = "avx512_vnni"

_CHOSEN: dict[tuple[Any, ...], str] = {}


#: What the operands look like -> the kernel that takes them, "" where torch does.
_KERNELS: dict[tuple[Any, ...], str] = {}
#: id of weight_packed -> what was found out about it.
_PLANS: dict[int, _Plan] = {}
if hasattr(os, "register_at_fork"):  # so that a child's first call settles what a fork leaves behind
    os.register_at_fork(after_in_child=_PLANS.clear)


class Call(NamedTuple):
    """One product: out [..., N] = x [..., K] @ dequantized.T + bias, by a kernel.

    Attributes:
        kernel: the path that multiplies, of native.PATHS.
        bits: of the weight's codes, 4 or 8.
        product: the kernel, with the weight.
        x: contiguous, or a matrix whose rows are each in one piece. out: contiguous.
        is_rounded: whether x was rounded for this, and may have become infinite.
    """

    kernel: str
    bits: int
    product: native.Linear
    x: Tensor
    weight: QuantizedWeight
    bias: Tensor | None
    group_size: int
    out: Tensor
    is_rounded: bool = False

    @property
    def rows(self) -> int:
        """M, the product of x's leading sizes."""
        return self.out.numel() // self.out.shape[-1]


@dataclass(slots=True, eq=False)
class _Plan:
    """What the last call with a weight found out, for the next one, which looks the same in nearly every program.

    Finding it by what the operands look like takes 4 us, as long as the product of a small layer. Attributes are the
    operands, which must be the same objects in the same memory; `x` is its dtype and K. `product` is None where torch
    multiplies.
    """

    path: str
    packed: weakref.ref[Tensor]
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    memory: tuple[Any, ...]
    x: tuple[torch.dtype, int]
    group_size: int
    compute: str
    kernel: str
    product: native.Linear | None

    def fits(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, group_size: int, compute: str) -> bool:
        packed, scale, zero_point = weight
        return (
            self.packed() is packed
            and self.scale is scale
            and self.zero_point is zero_point
            and self.bias is bias
            and self.x == (x.dtype, x.shape[-1])
            and self.group_size == group_size
            and self.compute == compute
            and self.memory == _memory(packed, scale, zero_point, bias)
            and self.path == native.path()
        )


def _memory(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    """Where they lie and what they look like there: `tensor.data = ...` changes it."""
    found: tuple[Any, ...] = (packed.data_ptr(), packed.shape, scale.data_ptr(), scale.nbytes, scale.dtype)
    if zero_point is not None:
        found += (zero_point.data_ptr(), zero_point.nbytes)
    return found if bias is None else (*found, bias.data_ptr(), bias.nbytes, bias.dtype)


def linear(
    bits: int,
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    group_size: int,
    compute: str,
    check: Callable[[], None],
) -> tuple[Tensor | None, bool]:
    """x [..., K] -> [..., N] in x's dtype, and whether it is finite; None where the kernels do not take it.

    `check` raises unless the operands fit. It runs once for operands that look the same.
    """
    packed = weight.weight_packed
    plan = _PLANS.get(id(packed))
    if plan is None or not plan.fits(x, weight, bias, group_size, compute):
        plan = _new_plan(bits, x, weight, bias, group_size, compute, check)
    product = plan.product
    if product is None:
        return None, True
    outputs = product.outputs
    out = x.new_empty(*x.shape[:-1], outputs)
    if not out.numel():
        return out, True
    if not x.data_ptr():
        check_places(x=x)  # says what is wrong with it
    given = x
    if compute == "bfloat16":
        x = x.bfloat16()
    if compute == "int8" and plan.kernel != INT8:
        x = affine.round_activations(x, group_size)
    is_rounded = x is not given
    if not x.is_contiguous():
        x = _matrix(x)
    if out.numel() <= ALWAYS_FEW * outputs:
        return out, product(x, out, few=True)
    call = Call(plan.kernel, bits, product, x, weight, bias, group_size, out, is_rounded)
    return out, run(choose(call), call)


def _new_plan(
    bits: int,
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    group_size: int,
    compute: str,
    check: Callable[[], None],
) -> _Plan:
    forking.settle()
    packed, scale, zero_point = weight
    path = native.path()
    key = (
        path, bits, x.dtype, x.shape[-1:], packed.shape, packed.dtype, packed.is_contiguous(),
        scale.shape, scale.dtype, scale.is_contiguous(), zero_point is None or _look(zero_point),
        bias is None or _look(bias), group_size, compute,
    )  # fmt: skip
    kernel = _KERNELS.get(key)
    if kernel is None:
        check()
        kernel = _KERNELS[key] = _kernel(bits, x, weight, bias, compute)
    named = {"weight" if bits == 8 else "weight_packed": packed, "weight_scale": scale}
    check_places(**named, weight_zero_point=zero_point, bias=bias)
    at = id(packed)
    gone = weakref.ref(packed, lambda _: _PLANS.pop(at, None))
    memory = _memory(packed, scale, zero_point, bias)
    columns = x.shape[-1]
    product = native.Linear(f"int{bits}_{kernel}", weight, bias, group_size, columns) if kernel else None
    plan = _PLANS[at] = _Plan(
        path, gone, scale, zero_point, bias, memory, (x.dtype, columns), group_size, compute, kernel, product
    )
    return plan


def _look(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.is_contiguous()


def _kernel(bits: int, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, compute: str) -> str:
    path = native.path()
    if path == "torch":
        native.say_slow()
        return ""
    if x.dtype not in native.TYPES or x.shape[-1] == 0 or not native.takes(weight, bias):
        return ""
    if compute == "int8" and native.has_int8(path):
        return INT8
    return "avx512" if path == "avx512_bf16" and (bits == 8 or compute in ("float32", "int8")) else path


def _matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with rows in one piece: a view where strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def choose(call: Call) -> str:
    """The way: by the number of rows where that settles it, else measured once for the class of shapes."""
    rows = call.rows
    candidates = _candidates(call, rows)
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    sizes = (n.bit_length() for n in (rows, call.x.shape[-1], call.out.shape[-1], call.group_size + 1))
    key = (call.kernel, call.bits, call.x.dtype, forking.threads(), *sizes)
    if key not in _CHOSEN:
        best, least = candidates[0], float("inf")
        for way in candidates:
            seconds = _seconds(way, call)
            if seconds < MARGIN * least:
                best, least = way, seconds
        _CHOSEN[key] = best
    return _CHOSEN[key]


def _candidates(call: Call, rows: int) -> list[str]:
    """The ways that may be fastest, at first the one that is taken when nothing is timed."""
    if call.kernel == INT8:
        return ["many"]
    if call.bits == 8:
        if rows < MATMUL:
            return ["many"]
        return ["matmul", "many"] if rows < NEVER_REGISTERS else ["matmul"]
    few = ["few"] if rows < NEVER_FEW else []
    matmul = ["matmul"] if rows >= MATMUL and (call.kernel != "avx512_bf16" or _multiplies_halves(call)) else []
    return ["many", *few, *matmul] if rows > 2 * ALWAYS_FEW else [*few, "many", *matmul]


def _seconds(way: str, call: Call) -> float:
    least = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(way, call)
        least = min(least, time.perf_counter() - start)
    return least


def run(way: str, call: Call) -> bool:
    """Fills call.out in that way, and tells whether it is to be trusted: finite, or what torch's matmul gives for x."""
    if way != "matmul":
        return call.product(call.x, call.out, way == "few")
    _matmul(call)
    return not call.is_rounded or bool(call.out.isfinite().all())


def _multiplies_halves(call: Call) -> bool:
    """Whether torch's matmul takes bfloat16: its result is then bfloat16 as well, which may lose nothing."""
    return call.out.dtype == torch.bfloat16 and (call.kernel == "avx512_bf16" or call.bits == 8)


def _matmul(call: Call) -> None:
    dtype = torch.bfloat16 if _multiplies_halves(call) else torch.float32
    columns, outputs = call.x.shape[-1], call.out.shape[-1]
    x, out = call.x.reshape(-1, columns).to(dtype), call.out.view(-1, outputs)
    bias = None if call.bias is None else call.bias.to(dtype)
    height = max(16, SCRATCH // (columns * dtype.itemsize))
    scratch = torch.empty(min(height, outputs), columns, dtype=dtype)
    for first in range(0, outputs, height):
        at = slice(first, first + height)
        tile = scratch[: out[:, at].shape[1]]
        native.dequantize(call.bits, call.weight, call.group_size, tile, first)
        out[:, at] = x @ tile.t() if bias is None else torch.addmm(bias[at], x, tile.t())
