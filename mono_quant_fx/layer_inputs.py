"""What a weight's columns multiply: an op's activations as the matrix X [groups, samples, K] of y = X @ weight.T.

For linear ops these are the activations themselves; for a convolution its unfolded patches, for a transposed one the
patches of the zero-stuffed input under the flipped kernel (arXiv 1603.07285, sec. 4). The Hessian of GPTQ and the
energies of the clip search are sums over these rows.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from mono_quant_fx.graph import op_name
from mono_quant_fx.weight_ops import argument

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


def layer_inputs(node: fx.Node, x: Tensor, weight_shape: tuple[int, ...]) -> Tensor | None:
    """X [groups, samples, K] for the consumer `node` of a weight of that shape; None where an op has none."""
    name = op_name(node).removeprefix("aten.").removeprefix(".").split(".")[0]
    if name in ("linear", "addmm", "matmul", "mm", "int4_linear", "int8_linear"):
        return x.reshape(1, -1, x.shape[-1])
    if name.startswith("conv_transpose"):
        return _transposed_patches(node, x, weight_shape)
    if name.startswith("conv") and name != "convolution":
        return _patches(node, x, weight_shape)
    return None


def _patches(node: fx.Node, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    window = conv_window(node, len(shape) - 2)
    if window is None:
        return None
    stride, padding, dilation, groups = window
    return _unfold(F.pad(x, _both_sides(padding)), shape[2:], stride, dilation, groups)


def conv_window(node: fx.Node, dims: int) -> tuple[list[int], list[int], list[int], int] | None:
    """stride, padding, dilation, groups of a convolution, a number a dimension; None for "same" or computed sizes."""
    stride, padding, dilation = (_spread(argument(node, (i, n)), dims, d) for i, n, d in _CONV_ARGUMENTS)
    if stride is None or padding is None or dilation is None:
        return None
    return stride, padding, dilation, argument(node, (6, "groups")) or 1


_CONV_ARGUMENTS = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def _transposed_patches(node: fx.Node, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    dims, kernel = len(shape) - 2, shape[2:]
    stride = _spread(argument(node, (3, "stride")), dims, 1)
    padding = _spread(argument(node, (4, "padding")), dims, 0)
    extra = _spread(argument(node, (5, "output_padding")), dims, 0)
    groups = argument(node, (6, "groups")) or 1
    dilation = _spread(argument(node, (7, "dilation")), dims, 1)
    if stride is None or padding is None or extra is None or dilation is None:
        return None
    stuffed = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
    at: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
    stuffed[at] = x
    edges = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    sides = [side for edge, e in zip(reversed(edges), reversed(extra), strict=True) for side in (edge, edge + e)]
    patches = _unfold(F.pad(stuffed, sides), kernel, [1] * dims, dilation, groups)
    per_kernel = patches.unflatten(2, (-1, *kernel))
    return per_kernel.flip(tuple(range(3, 3 + dims))).flatten(2)


def _unfold(x: Tensor, kernel: tuple[int, ...], stride: list[int], dilation: list[int], groups: int) -> Tensor:
    """[batch, channels, *size] -> [groups, batch * positions, K], columns in the order of weight.flatten(1)."""
    dims = len(kernel)
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (groups, -1))  # [batch, groups, channels/groups, *positions, *kernel]
    order = [1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    x = x.permute(order)
    return x.reshape(groups, -1, x.shape[2 + dims :].numel())


def _spread(value: Any, dims: int, default: int) -> list[int] | None:
    """One number a dimension; None for "same" and the like, or for a size that is itself computed."""
    if value is None:
        return [default] * dims
    values = list(value) if isinstance(value, list | tuple) else [value] * dims
    values = values * dims if len(values) == 1 else values
    return values if all(isinstance(v, int) for v in values) else None


def _both_sides(padding: list[int]) -> list[int]:
    return [side for p in reversed(padding) for side in (p, p)]
