"""Linears of one input, each by itself, against one op whose result is split: python -m tests.benchmarks.merging.

One process; the median of interleaved repeats, on weights that rotate, so that none stays in the last-level cache. Each
piece is read once by an elementwise op, so that reading columns of a wider result is paid for. Ratios say how many
times faster merged is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import Tensor

import mono_quant_fx as mq
from mono_quant_fx import ops
from tests.benchmarks.linear import ROTATED
from tests.benchmarks.timing import Run, medians

ROWS = (1, 4, 16, 64, 256, 512)
#: Name -> columns, and the rows of each weight.
LAYERS = {
    "SmolLM2 q, k, v": (576, (576, 192, 192)),
    "SmolLM2 gate, up": (576, (1536, 1536)),
    "MiniLM q, k, v": (384, (384, 384, 384)),
    "Llama-7B gate, up": (4096, (11008, 11008)),
}
NAMES = ("apart", "views", "copies")


def runs(rows: int, columns: int, outputs: Sequence[int], group_size: int, dtype: torch.dtype) -> dict[str, Run]:
    """Name -> what computes all products with the weights of that number."""
    aten, sizes = torch.ops.aten, list(outputs)
    copies = min(1000, max(2, -(-ROTATED // (columns * sum(outputs) // 2))))
    wholes, parts = [], []
    for _ in range(copies):
        packed, scale, _ = mq.quantize_weight_int4(torch.randn(sum(outputs), columns) / columns**0.5, group_size)
        wholes.append((packed, scale.to(dtype)))
        pairs = zip(packed.split(sizes), scale.to(dtype).split(sizes), strict=True)
        parts.append([(a.clone(), b.clone()) for a, b in pairs])
    x = torch.randn(1, rows, columns).to(dtype)

    def read(pieces: Sequence[Tensor]) -> Tensor:
        return [piece * 1.5 for piece in pieces][-1]

    def merged(i: int) -> Tensor:
        packed, scale = wholes[i % copies]
        return ops.int4_linear(x, packed, scale, None, None, group_size)

    return {
        "apart": lambda i: read([ops.int4_linear(x, *w, None, None, group_size) for w in parts[i % copies]]),
        "views": lambda i: read(aten.split_with_sizes.default(merged(i), sizes, -1)),
        "copies": lambda i: read(aten.split_with_sizes_copy.default(merged(i), sizes, -1)),
    }


def line(rows: int, taken: dict[str, float]) -> list[str]:
    """One row of the table: milliseconds apart, and how many times faster merged is."""
    apart = taken["apart"]
    return [str(rows), f"{apart:.3f}", *(f"{apart / taken[name]:.2f}x" for name in NAMES[1:])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one table a group of layers."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.merging", description=__doc__)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS)[:3])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of x")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number of rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{mq.kernels()}; torch {torch.__version__}, {options.threads} threads, {options.dtype} x\n")
    for name in options.layers:
        columns, outputs = LAYERS[name]
        lines = []
        for rows in options.rows:
            found = runs(rows, columns, outputs, options.group_size, getattr(torch, options.dtype))
            lines.append(line(rows, {name: 1e3 * s for name, s in medians(found, options.seconds).items()}))
        print(f"{name}: {' + '.join(map(str, outputs))} x {columns}, groups of {options.group_size}\n")
        print(tabulate(lines, ("rows", "ms apart", *NAMES[1:]), tablefmt="github", disable_numparse=True))
        print()


if __name__ == "__main__":
    main()
