"""INT4 linear beside float and torch's own INT4, in one process: python -m tests.benchmarks.linear

Each figure is the median of interleaved repeats, on weights that rotate, so that none stays in the last-level cache.
Ratios say how many times faster mono_quant_fx is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

import mono_quant_fx as mq
from mono_quant_fx import ops

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
#: Bytes that all copies of the INT4 weight take together: more than a last-level cache holds.
ROTATED = 48 << 20
#: What the peers multiply; fp32 x goes through bfloat16 in all but the first.
PEERS = ("fp32 F.linear", "bf16 F.linear", "aten int4pack, bf16 x")
Run = Callable[[int], Tensor]


def runs(rows: int, columns: int, outputs: int, group_size: int, dtype: torch.dtype) -> dict[str, Run]:
    """Name -> what computes the product with the weight of that number."""
    copies = max(2, -(-ROTATED // (columns * outputs // 2)))
    weights = [torch.randn(outputs, columns) / columns**0.5 for _ in range(copies)]
    stored = [mq.quantize_weight_int4(w, group_size) for w in weights]
    halves = [w.bfloat16() for w in weights]
    x = torch.randn(rows, columns)
    x16, xd = x.bfloat16(), x.to(dtype)
    found: dict[str, Run] = {
        "mono_quant_fx": lambda i: ops.int4_linear(xd, *stored[i % copies], None, group_size),
        PEERS[0]: lambda i: F.linear(x, weights[i % copies]),
        PEERS[1]: lambda i: F.linear(x16, halves[i % copies]),
    }
    if columns % group_size == 0 and outputs % 16 == 0 and group_size in (32, 64, 128, 256):
        packed = [_aten(s, group_size) for s in stored]
        pack_mm = torch.ops.aten._weight_int4pack_mm_for_cpu
        found[PEERS[2]] = lambda i: pack_mm(x16, packed[i % copies][0], group_size, packed[i % copies][1])
    return found


def _aten(stored: mq.QuantizedWeight, group_size: int) -> tuple[Tensor, Tensor]:
    """The weight in the layout of aten's kernel: codes 0..15, and scale and zero of each group."""
    codes = torch.randint(0, 16, (stored.weight_packed.shape[0], stored.weight_packed.shape[1] * 8), dtype=torch.int32)
    scale = stored.weight_scale.t().bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()


def milliseconds(found: dict[str, Run], seconds: float) -> dict[str, float]:
    """Medians of interleaved repeats, until `seconds` are over."""
    for run in found.values():
        run(0), run(1)
    taken: dict[str, list[float]] = {name: [] for name in found}
    end, i = time.perf_counter() + seconds, 0
    while i < 5 or time.perf_counter() < end:
        for name, run in found.items():
            start = time.perf_counter()
            run(i)
            taken[name].append(1e3 * (time.perf_counter() - start))
        i += 1
    return {name: statistics.median(each) for name, each in taken.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one table a shape."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.linear", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of x")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number of rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{mq.kernels()}; torch {torch.__version__}, {options.threads} threads, {options.dtype} x\n")
    for shape in options.shapes:
        outputs, columns = map(int, shape.split("x"))
        lines = []
        for rows in options.rows:
            found = runs(rows, columns, outputs, options.group_size, getattr(torch, options.dtype))
            taken = milliseconds(found, options.seconds)
            ours = taken["mono_quant_fx"]
            lines.append([rows, f"{ours:.3f}", *(f"{taken[p] / ours:.2f}x" if p in taken else "" for p in PEERS)])
        print(f"N x K = {shape}, groups of {options.group_size}\n")
        print(tabulate(lines, ("rows", "ms", *(f"vs {p}" for p in PEERS)), tablefmt="github", disable_numparse=True))
        print()


if __name__ == "__main__":
    main()
