"""The geometry of a convolution: the sizes of its kernel, how it steps, and what of it no convolution can have."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Sizes up to which the kernels of a convolution count without overflow.
MOST = 2**30


class Window(NamedTuple):
    """One number a dimension, and the groups."""

    size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def check(self, x: tuple[int, ...], rows: int, columns: int) -> None:
        """Raises RuntimeError unless x [..., channels, *sizes] can be convolved with a weight [rows, columns]."""
        dims = len(self.size)
        torch._check(
            dims in (1, 2, 3) and len(x) in (dims + 1, dims + 2),
            lambda: f"x is {tuple(x)}; [batch, channels] and {dims} sizes needed",
        )
        for name, least in (("size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            self._check_numbers(name, least)
        channels, groups = x[-dims - 1], self.groups
        torch._check(
            1 <= groups <= MOST and channels % groups == 0 and rows % groups == 0,
            lambda: f"groups={groups} must divide {channels} channels of x and {rows} of the weight",
        )
        needed = channels // groups
        for k in self.size:
            needed = needed * k
        torch._check(columns == needed, lambda: f"x is {tuple(x)}, so rows of {needed} are needed, not {columns}")
        for out in self.out_sizes(x):
            torch._check(
                out >= 1,
                lambda: (
                    f"x is {tuple(x)}: too small for kernel_size={self.size}, padding={self.padding}, "
                    f"dilation={self.dilation}"
                ),
            )

    def _check_numbers(self, name: str, least: int) -> None:
        numbers, shown = getattr(self, name), "kernel_size" if name == "size" else name
        torch._check(
            len(numbers) == len(self.size) and all(least <= n <= MOST for n in numbers),
            lambda: f"{shown}={list(numbers)}: {len(self.size)} numbers from {least} to {MOST} needed",
        )

    def out_sizes(self, x: tuple[int, ...]) -> list[int]:
        """The sizes of the result, for those of x [..., *sizes]."""
        places = zip(x[-len(self.size) :], self.size, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in places]
