"""What a weight's columns multiply: an op's activations as the matrix X [groups, samples, K] of y = X @ weight.T.

For linear ops these are the activations themselves, or their columns where the weight stands on the left; for a
convolution its unfolded patches, for a transposed one the patches of the zero-stuffed input under the flipped kernel
(arXiv 1603.07285, sec. 4). The Hessian of GPTQ and the energies of the clip search are sums over these rows.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from mono_quant_fx.graph.tensors import op_name
from mono_quant_fx.graph.weight_table import WeightOp
from mono_quant_fx.graph.windows import ConvWindow, read_window

SAMPLES_A_TIME = 1 << 14


class Hessian:
    """H [groups, K, K] = sum of x x^T over everything added, in float32 (sums of at most SAMPLES_A_TIME rows each)."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        """Adds X [groups, samples, K]."""
        self.rows += inputs.shape[1]
        for part in inputs.split(SAMPLES_A_TIME, 1):
            x = part.float()
            product = x.transpose(1, 2) @ x
            self.value = product if self.value is None else self.value.add_(product)


def no_matrix(node: fx.Node, row: WeightOp | None, weight_shape: tuple[int, ...]) -> str:
    """Why the inputs of a weight's consumer are no such matrix; "" where they are."""
    if row is None or row.inputs == "none":
        return f"{op_name(node)} multiplies its rows with nothing that data could show"
    if row.inputs == "patches" and read_window(node, weight_shape[2:]) is None:
        return f"the window of {op_name(node)} is itself computed"
    return ""


def layer_inputs(node: fx.Node, row: WeightOp, x: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
    """X [groups, samples, K] for the consumer `node` of a weight of that shape, by a row that no_matrix has passed.

    A vector is one sample, and so is a convolution's input without a batch.

    Raises:
        ValueError: x has too few axes for the op.
    """
    if row.inputs == "second_last":
        x = x.unsqueeze(-1) if x.dim() == 1 else x
        return x.transpose(-1, -2).reshape(1, -1, x.shape[-2])
    if row.inputs == "last":
        return x.reshape(1, -1, x.shape[-1])
    kernel = weight_shape[2:]
    window, dims = read_window(node, kernel), len(kernel)
    if window is None or x.dim() not in (dims + 1, dims + 2):
        raise ValueError(f"an input of {x.dim()} axes under a kernel of {dims}")
    batch = x if x.dim() == dims + 2 else x[None]
    return (_transposed_patches if window.is_transposed else _patches)(batch, window, kernel)


def _patches(x: Tensor, window: ConvWindow, kernel: tuple[int, ...]) -> Tensor:
    sides = [*zip(window.before, window.after, strict=True)]
    return _unfold(F.pad(x, _flat(sides)), kernel, window.stride, window.dilation, window.groups)


def _transposed_patches(x: Tensor, window: ConvWindow, kernel: tuple[int, ...]) -> Tensor:
    dims = len(kernel)
    stuffed = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], window.stride, strict=True)))
    at: tuple[Any, ...] = (..., *(slice(None, None, s) for s in window.stride))
    stuffed[at] = x
    edges = [d * (k - 1) - p for d, k, p in zip(window.dilation, kernel, window.before, strict=True)]
    sides = [(edge, edge + more) for edge, more in zip(edges, window.extra, strict=True)]
    patches = _unfold(F.pad(stuffed, _flat(sides)), kernel, (1,) * dims, window.dilation, window.groups)
    per_kernel = patches.unflatten(2, (-1, *kernel))
    return per_kernel.flip(tuple(range(3, 3 + dims))).flatten(2)


def _unfold(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> Tensor:
    """[batch, channels, *size] -> [groups, batch * positions, K], columns in the order of weight.flatten(1)."""
    dims = len(kernel)
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (groups, -1))  # [batch, groups, channels/groups, *positions, *kernel]
    order = [1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    x = x.permute(order)
    columns = x.shape[2 + dims :].numel()
    return x.reshape(groups, x.numel() // max(1, groups * columns), columns)


def _flat(sides: list[tuple[int, int]]) -> list[int]:
    """(before, after) of each dimension as F.pad wants them, the last dimension first."""
    return [zeros for pair in reversed(sides) for zeros in pair]
