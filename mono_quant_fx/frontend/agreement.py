"""Whether two outputs are one and the same, up to what rounding in the dtypes of the computation explains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mono_quant_fx.numerics.error import ErrorSum


@dataclass(frozen=True)
class Tolerance:
    """How far two runs of one computation may lie apart, when their sums are taken in another order.

    Attributes:
        least_db: SQNR of a whole output.
        relative: difference of an element, as a share of it; added to that of `scaled`.
        scaled: difference of an element, as a share of the output's root mean square.
        integers: share of an integer output's elements that may differ (near ties of an argmax).
    """

    least_db: float
    relative: float
    scaled: float
    integers: float


#: By the coarsest floating dtype of a computation. Rounding noise alone gives a deep model 120, 60 and 40 dB or more.
FINE = Tolerance(60.0, 1e-3, 1e-4, 1e-3)
HALF = Tolerance(38.0, 2e-2, 8e-2, 5e-2)
COARSE = Tolerance(26.0, 5e-2, 0.3, 5e-2)
#: What no output is asked to be nearer than: a difference of ones in float32.
FLOOR = 5e-7
#: Elements that are compared at a time.
TILE = 1 << 19


def tolerance(dtype: torch.dtype) -> Tolerance:
    """What is asked where `dtype` is the coarsest."""
    eps = torch.finfo(dtype).eps
    return FINE if eps <= torch.finfo(torch.float32).eps else HALF if eps <= torch.finfo(torch.float16).eps else COARSE


def difference(expected: list[Any], actual: list[Any], allowed: Tolerance) -> str | None:
    """What sets two lists of outputs apart, in words; None where they agree."""
    if len(expected) != len(actual):
        return f"{len(actual)} outputs instead of {len(expected)}"
    for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
        reason = _apart(a, b, allowed)
        if reason is not None:
            return f"output {i}{_shown(a)} {reason}"
    return None


def _apart(a: Any, b: Any, allowed: Tolerance) -> str | None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        is_same = type(a) is type(b) and (not isinstance(a, int | float | str) or a == b)
        return None if is_same else f"is {b!r:.40} instead of {a!r:.40}"
    for what in ("shape", "dtype", "device"):
        if getattr(a, what) != getattr(b, what):
            return f"has {what} {_plain(getattr(b, what))}"
    if a.is_complex():
        return _apart(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()), allowed)
    if not a.is_floating_point():
        share = float((a != b).double().mean()) if a.numel() else 0.0
        return f"differs in {share:.2%} of its elements" if share > allowed.integers else None
    return _floats_apart(a.detach(), b.detach(), allowed)


def _floats_apart(a: Tensor, b: Tensor, allowed: Tolerance) -> str | None:
    """Works on a tile at a time: logits of a language model in float64, several times over, would take gigabytes."""
    odd, most, count = 0, 0.0, 0
    for x, y in _tiles(a, b):
        finite = x.isfinite() & y.isfinite()
        odd += int((~finite & ~((x == y) | (x.isnan() & y.isnan()))).sum())
        most, count = max(most, float(torch.where(finite, x, 0.0).abs().amax())), count + int(finite.sum())
    if odd:
        return f"is finite in other places ({odd} of {a.numel()})"
    if not count:
        return None
    total, squares = ErrorSum(), 0.0
    for x, y in _finite_tiles(a, b):
        total.add(x, y)
        squares += float((x / most).square().sum()) if most > 0 else 0.0
    scale = most * math.sqrt(squares / count)
    is_near = all(
        bool(((x - y).abs() <= allowed.relative * x.abs() + allowed.scaled * scale + FLOOR).all())
        for x, y in _finite_tiles(a, b)
    )
    decibels = total.sqnr_db or 0.0
    if is_near and (decibels >= allowed.least_db or total.max_abs <= FLOOR):
        return None
    largest = f"the largest difference is {total.max_abs:.3g} in values up to {most:.3g}"
    return f"agrees to {decibels:.1f} dB, {largest}"


def _tiles(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in float64, some elements at a time."""
    for x, y in zip(a.reshape(-1).split(TILE), b.reshape(-1).split(TILE), strict=True):
        if x.numel():
            yield x.double(), y.double()


def _finite_tiles(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in _tiles(a, b):
        finite = x.isfinite()
        if bool(finite.any()):
            yield x[finite], y[finite]


def coarsest(run: Callable[[], Any], values: Iterator[Any]) -> torch.dtype:
    """The floating dtype of least precision among `values` and everything that `run` computes."""
    with _Watch() as watch:
        run()
    seen = [*watch.seen, *(t.dtype for t in values if isinstance(t, Tensor) and t.is_floating_point())]
    return max(seen, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {
            t.dtype for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()
        }
        return out


def _shown(value: Any) -> str:
    return f" ({_plain(value.dtype)}{list(value.shape)})" if isinstance(value, Tensor) else ""


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")
