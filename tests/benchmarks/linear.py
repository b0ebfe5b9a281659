"""INT4 linear beside float and other packages' INT4, in one process: python -m tests.benchmarks.linear

Each figure is the median of calls in turns, on weights that rotate, so that none stays in the last-level cache.
Ratios say how many times faster mono_quant_fx is. With --page all that docs/performance.md shows of linears is
measured, and the page is written anew.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.ops import native
from tests.benchmarks import performance_page
from tests.benchmarks.accuracy_cache import ROOT
from tests.benchmarks.accuracy_cell import one_line
from tests.benchmarks.accuracy_settings import OURS
from tests.benchmarks.linear_peers import BF16, FP32, PEERS, Peer, Product, Shape, ours, prepare
from tests.benchmarks.performance_store import DEFAULT, PAGE, Store
from tests.benchmarks.timing import Run, medians

SHAPES = ("4096x4096", "4096x11008", "11008x4096", "2048x2048", "576x1536", "384x1536")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
#: Bytes that all copies of the INT4 weight take together: more than a last-level cache holds.
ROTATED = 48 << 20
#: Calls that one measurement of the overhead takes together.
MANY = 200
Figures = dict[str, Any]


def measure(shape: str, rows: Sequence[int], peers: Mapping[str, Peer], group_size: int, dtype: str, seconds: float,
            rotated: int = ROTATED, compute: str = "auto") -> Figures:  # fmt: skip
    """One table: milliseconds by rows and name, and why a peer has none.

    Args:
        shape: "NxK".
        dtype: of the x that mono_quant_fx gets.
        seconds: for each number of rows.
        rotated: bytes of all copies of the INT4 weight.
        compute: how mono_quant_fx multiplies.
    """
    outputs, columns = map(int, shape.split("x"))
    copies = max(2, -(-rotated // (columns * outputs // 2)))
    weights = Shape([torch.randn(outputs, columns) / columns**0.5 for _ in range(copies)], group_size)
    products: dict[str, Product] = {OURS: prepare(ours(getattr(torch, dtype), compute), weights)}
    reasons: dict[str, str] = {}
    for name, peer in peers.items():
        try:
            products[name] = prepare(peer.make, weights)
        except Exception as e:
            reasons[name] = one_line(f"{type(e).__name__}: {e}")
    found = {}
    for count in rows:
        x = torch.randn(count, columns)
        taken = medians({name: product(x) for name, product in products.items()}, seconds)
        found[str(count)] = {name: 1e3 * each for name, each in taken.items()}
    return {"shape": shape, "group_size": group_size, "dtype": dtype, "path": mq.kernels().active,
            "kernels": str(mq.kernels()), "milliseconds": found, "reasons": reasons}  # fmt: skip


def overhead(seconds: float) -> Figures:
    """Microseconds of a call of 1 x 64 by 64 x 64, by type of x and by name: what is left when nothing is computed."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = torch.randn(64, 64), torch.randn(1, 64, dtype=dtype)
        stored, plain = mq.quantize_weight_int4(weight, 64), weight.to(dtype)
        runs = {
            OURS: _often(lambda x=x, stored=stored: ops.int4_linear(x, *stored, None, 64)),
            "F.linear": _often(lambda x=x, plain=plain: F.linear(x, plain)),
        }
        taken = medians(runs, seconds)
        found[str(dtype).removeprefix("torch.")] = {name: 1e6 * each / MANY for name, each in taken.items()}
    return {"microseconds": found, "path": mq.kernels().active}


def _often(call: Callable[[], object]) -> Run:
    def run(_: int) -> None:
        for _ in range(MANY):
            call()

    return run


def measure_page(options: argparse.Namespace) -> None:
    """Every table of the page, each kept as soon as it is there; a path other than the active one has a process."""
    store, packages = Store(options.cache), {peer.package for peer in PEERS.values()} - {"torch"}

    def keep(key: str, figures: Figures) -> None:
        print(performance_page.linear_text(figures), flush=True)
        store.add(key, figures, sorted(packages))

    figures = overhead(options.seconds)
    store.add("overhead", figures)
    for shape in options.shapes:
        keep(f"linear {shape}", measure(shape, options.rows, PEERS, options.group_size, "bfloat16", options.seconds))
    first, active = options.shapes[0], mq.kernels().active
    in_float = {name: PEERS[name] for name in (FP32, "ORT level 0", "ORT level 4")}
    keep("linear float32", measure(first, options.rows, in_float, options.group_size, "float32", options.seconds))
    in_int8 = {name: PEERS[name] for name in (FP32, BF16, "ORT level 4", "torchao 8da4w")}
    found = measure(first, options.rows, in_int8, options.group_size, "bfloat16", options.seconds, compute="int8")
    keep("linear int8", found)
    for path in [p for p in native.PATHS if p in mq.kernels().available and p != active]:
        store.add(f"path {path}", _on_path(path, first, options))
    performance_page.write(PAGE if options.page is True else Path(options.page), store)


def _on_path(path: str, shape: str, options: argparse.Namespace) -> Figures:
    """The table of fp32 x against F.linear on another path, which a process chooses once."""
    rows = map(str, options.rows)
    command = [sys.executable, "-m", "tests.benchmarks.linear", "--shapes", shape, "--rows", *rows, "--json"]
    command += ["--dtype", "float32", "--peers", FP32, "--group-size", str(options.group_size)]
    command += ["--threads", str(options.threads), "--seconds", str(options.seconds / 2)]
    where = {**os.environ, native.VARIABLE: path}
    done = subprocess.run(command, cwd=ROOT, env=where, stdout=subprocess.PIPE, text=True, check=True)
    print(performance_page.linear_text(figures := json_line(done.stdout)), flush=True)
    return figures


def json_line(text: str) -> Figures:
    """The last line of what a process of this benchmark printed."""
    found: Figures = json.loads(text.splitlines()[-1])
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.linear", description=__doc__)
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="default: 4096x4096, and all six with --page")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of x")
    parser.add_argument("--peers", nargs="*", default=["*"], metavar="PATTERN", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number of rows")
    parser.add_argument("--json", action="store_true", help="print plain data instead of tables")
    parser.add_argument("--page", nargs="?", const=True, help="measure everything, write docs/performance.md (or PAGE)")
    parser.add_argument("--cache", type=Path, default=DEFAULT, help=f"where --page keeps figures; default: {DEFAULT}")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or list(SHAPES if options.page else SHAPES[:1])
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one table a shape."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        if options.page:
            measure_page(options)
            return
        chosen = {n: p for n, p in PEERS.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in options.peers)}
        for shape in options.shapes:
            figures = measure(shape, options.rows, chosen, options.group_size, options.dtype, options.seconds)
            if options.json:
                print(json.dumps(figures))
            else:
                print(f"{figures['kernels']}\ntorch {torch.__version__}, {options.threads} threads\n")
                print(performance_page.linear_text(figures), flush=True)
                print(*(f"{name}: {reason}" for name, reason in figures["reasons"].items()), sep="\n")


if __name__ == "__main__":
    main()
