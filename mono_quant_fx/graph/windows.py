"""The window of a convolution: how its kernel moves over the input, read from the call in every spelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from mono_quant_fx.graph.arguments import Arg, argument
from mono_quant_fx.graph.weight_table import GENERAL_CONVS, TRANSPOSED, rows_for


@dataclass(frozen=True)
class ConvWindow:
    """Numbers for each dimension of the kernel; `before` and `after` are zeros at the ends of the input.

    `extra` is what a transposed convolution adds behind its output (output_padding).
    """

    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    extra: tuple[int, ...]
    is_transposed: bool

    @property
    def padding(self) -> list[int] | None:
        """The zeros at both ends, where they are as many."""
        return list(self.before) if self.before == self.after else None


def read_window(node: fx.Node, kernel: tuple[int, ...]) -> ConvWindow | None:
    """The window of a convolution's call; None where one of its sizes is itself computed.

    padding="valid" has no zeros; "same" has dilation * (kernel - 1) of them in all, the odd one behind (as torch has).
    """
    dims = len(kernel)
    general = node.target in GENERAL_CONVS
    is_transposed = bool(argument(node, TRANSPOSED)) if general else rows_for(node)[0].layout == "transposed_conv"
    at = _GENERAL if general else _TRANSPOSED if is_transposed else _PLAIN
    stride, dilation = (_spread(argument(node, at[name], 1), dims) for name in ("stride", "dilation"))
    extra = _spread(argument(node, at["output_padding"], 0), dims) if is_transposed else (0,) * dims
    groups, padding = argument(node, at["groups"], 1), argument(node, at["padding"], 0)
    if padding == "valid":
        padding = 0
    if stride is None or dilation is None or extra is None or not isinstance(groups, int):
        return None
    if padding == "same":
        whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = tuple(n // 2 for n in whole)
        return ConvWindow(stride, before, tuple(n - n // 2 for n in whole), dilation, groups, extra, is_transposed)
    both = _spread(padding, dims)
    return None if both is None else ConvWindow(stride, both, both, dilation, groups, extra, is_transposed)


def _places(**places: int) -> dict[str, Arg]:
    return {name: (place, name) for name, place in places.items()}


_PLAIN = _places(stride=3, padding=4, dilation=5, groups=6)
_TRANSPOSED = _places(stride=3, padding=4, output_padding=5, groups=6, dilation=7)
_GENERAL = _places(stride=3, padding=4, dilation=5, output_padding=7, groups=8)


def _spread(value: Any, dims: int) -> tuple[int, ...] | None:
    """One number a dimension; None for a size that is itself computed."""
    values = list(value) if isinstance(value, list | tuple) else [value] * dims
    values = values * dims if len(values) == 1 else values
    return tuple(values) if len(values) == dims and all(isinstance(v, int) for v in values) else None
