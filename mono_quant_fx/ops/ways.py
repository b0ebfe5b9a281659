"""The ways of int4_linear on a CPU, and which one a call takes.

few      the kernel multiplies codes, and scales sums                  (avx512_bf16 only: elsewhere it is the next one)
many     the kernel scales codes in registers or in a panel that stays in L1
matmul   a tile of rows is dequantized into a scratch in L2, and torch multiplies

What is fastest depends on the machine, so the first call of a class of shapes runs each way that may be, a few times,
and the class keeps the best. Ways differ by rounding: with torch.use_deterministic_algorithms(True) nothing is timed,
and the choice follows from the number of rows alone.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from mono_quant_fx import native
from mono_quant_fx.numerics import QuantizedWeight

#: Up to so many rows the first way is always taken, and from so many on never.
FEW, NEVER_FEW = 4, 33
#: Rows from which torch's matmul is a candidate.
MATMUL = 9
#: Another way must be this much faster than the one before it.
MARGIN = 0.95
REPEATS = 3
#: Bytes of the scratch: half of a usual L2.
SCRATCH = 1 << 19

_CHOSEN: dict[tuple[Any, ...], str] = {}


def int4_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, group_size: int, compute: str
) -> Tensor | None:
    """x [..., K] -> [..., N] in x's dtype; None where the kernels do not take it. The operands are checked."""
    path = native.path()
    if path == "torch":
        native.say_slow()
        return None
    if x.dtype not in native.TYPES or not native.takes(*weight, bias):
        return None
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(-1) != 1 and flat.shape[1] > 1:
        flat = flat.contiguous()
    if path == "avx512_bf16" and compute == "float32":
        path = "avx512"
    elif compute == "bfloat16":
        flat = flat.bfloat16()
    out = x.new_empty(flat.shape[0], weight.weight_packed.shape[0])
    if out.numel():
        run(_way(path, flat, weight, bias, group_size, out), path, flat, weight, bias, group_size, out)
    return out.view(*x.shape[:-1], out.shape[1])


def _way(path: str, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, group_size: int, out: Tensor) -> str:
    """The way for a shape: by the number of rows where that settles it, else measured once for its class."""
    rows = x.shape[0]
    if rows <= FEW:
        return "few"
    candidates = ["few"] if rows < NEVER_FEW else []
    if path == "avx512_bf16" or rows < 4 * MATMUL:
        candidates.append("many")
    if rows >= MATMUL:
        candidates.append("matmul")
    if torch.are_deterministic_algorithms_enabled():
        return candidates[-1] if path != "avx512_bf16" else candidates[min(1, len(candidates) - 1)]
    sizes = (n.bit_length() for n in (rows, *x.shape[1:], out.shape[1], group_size + 1))
    key = (path, torch.get_num_threads(), x.dtype, *sizes)
    if key not in _CHOSEN:
        best, least = candidates[0], float("inf")
        for way in candidates:
            seconds = _seconds(way, path, x, weight, bias, group_size, out)
            if seconds < MARGIN * least:
                best, least = way, seconds
        _CHOSEN[key] = best
    return _CHOSEN[key]


def _seconds(way: str, *operands: Any) -> float:
    least = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(way, *operands)
        least = min(least, time.perf_counter() - start)
    return least


def run(
    way: str, path: str, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, group_size: int, out: Tensor
) -> None:
    """out [M, N] = x [M, K] @ dequantized.T + bias, by that way of that path."""
    if way == "matmul":
        _matmul(torch.bfloat16 if path == "avx512_bf16" else torch.float32, x, weight, bias, group_size, out)
    else:
        native.int4_linear(path, x, weight, bias, group_size, out, few=x.shape[0] if way == "few" else 0)


def _matmul(
    dtype: torch.dtype, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, group_size: int, out: Tensor
) -> None:
    x = x.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    height = max(16, SCRATCH // (x.shape[1] * dtype.itemsize))
    scratch = torch.empty(min(height, out.shape[1]), x.shape[1], dtype=dtype)
    for first in range(0, out.shape[1], height):
        at = slice(first, first + height)
        tile = scratch[: len(weight.weight_scale[at])]
        native.dequantize(4, weight, group_size, tile, first)
        out[:, at] = x @ tile.t() if bias is None else torch.addmm(bias[at], x, tile.t())
