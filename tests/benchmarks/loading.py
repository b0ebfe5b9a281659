"""A large INT4 file, loaded: python -m tests.benchmarks.loading [--layers 120] [--folder FOLDER]

Layers of 4096 x 4096 in groups of 128, 8.3 MiB each, saved by mono_quant_fx.save. Beside load, in turns and one
process: safetensors' own load_file of the same bytes. Both map the file; then one product per layer touches every page.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import mono_quant_fx as mq

WIDTH = 4096


def skeleton(layers: int) -> nn.Module:
    """The float model, without values."""
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))).eval().bfloat16()


def make(layers: int, path: Path) -> int:
    """Writes the file; the layers' weights are one random weight, turned."""
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH).bfloat16()
    model = skeleton(layers).to_empty(device="cpu")
    with torch.no_grad():
        for i, layer in enumerate(model):  # type: ignore[arg-type]
            layer.weight.copy_(weight.roll(i, 0))
    mq.quantize(model, accuracy_warning="ignore").save(path)
    return path.stat().st_size


def main(arguments: list[str] | None = None) -> None:
    """Prints seconds: medians."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.loading", description=__doc__)
    parser.add_argument("--layers", type=int, default=120)
    parser.add_argument("--folder", type=Path, help="where the file goes; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.safetensors"
        size = make(options.layers, path)
        x = torch.randn(1, WIDTH).bfloat16()
        ways: dict[str, Callable[[], Any]] = {
            "safetensors.torch.load_file": lambda: load_file(path),
            "mono_quant_fx.load": lambda: mq.load(path, skeleton(options.layers)),
            "mono_quant_fx.load, and one token": lambda: mq.load(path, skeleton(options.layers)).graph_module(x),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        with torch.inference_mode():
            for _ in range(options.rounds):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way()
                    seconds[name].append(time.perf_counter() - start)
    print(f"{size / 2**20:.0f} MiB, {options.layers} layers; seconds:")
    for name, found in seconds.items():
        print(f"  {name:36} {statistics.median(found):.3f}")


if __name__ == "__main__":
    main()
