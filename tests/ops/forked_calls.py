"""Forks after (or before) it used several threads, and calls each operator in a child: python -m ... used|fresh.

Prints, for each operator, what became of the child; one that waits for threads that are not there dies of SIGALRM.
"""

import os
import signal
import sys
import warnings

import torch

from mono_quant_fx import ops
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine

SECONDS = 20


def calls():
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(256, 256, generator=draw), torch.randn(96, 256, generator=draw)
    four = affine.quantize_matrix(weight, QuantScheme(4, 32, True))
    eight = affine.quantize_matrix(weight, QuantScheme(8, -1, True))
    scale, zero = torch.tensor([0.05]), torch.tensor([3], dtype=torch.int8)
    codes, image = torch.ones(96, 256, dtype=torch.int8), torch.ones(4, 16, 32, 32, dtype=torch.int8)
    window = [4, 4], [1, 1], [1, 1], [1, 1], 1
    return {
        "one row": lambda: ops.int4_linear(x[:1], *four, None, 32),
        **{c: lambda c=c: ops.int4_linear(x, *four, None, 32, c) for c in ("auto", "float32", "bfloat16", "int8")},
        "int8_linear": lambda: ops.int8_linear(x, *eight, None),
        "dequantize_int4": lambda: ops.dequantize_int4(*four, 32, 256),
        "dequantize_int8": lambda: ops.dequantize_int8(*eight),
        "quantize_activation": lambda: ops.quantize_activation(x.expand(4, 96, 256), scale, zero),
        "dequantize_activation": lambda: ops.dequantize_activation(codes.expand(4, 96, 256), scale, zero),
        "w8a8_linear": lambda: ops.w8a8_linear(codes, scale, zero, *eight, None),
        "w4a8_linear": lambda: ops.w4a8_linear(codes, scale, zero, *four, None, 32),
        "w8a8_conv": lambda: ops.w8a8_conv(image, scale, zero, *eight, None, *window),
    }


def in_a_child(call, expected):
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        out = call().float()
        near = expected is None or bool((out - expected).abs().max() <= 0.01 * expected.abs().max())
        os._exit(0 if near else 3)
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


def main(how):
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)  # no way is timed
    if how == "used":
        torch.randn(600, 600) @ torch.randn(600, 600)
    found = calls()
    expected = {name: call().float() if how == "used" else None for name, call in found.items()}
    for name, call in found.items():
        print(name, "->", in_a_child(call, expected[name]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
