"""Calls that put the axes of a tensor in another order: t, transpose, permute, movedim, T and their like.

What a call does is read from its arguments, in every spelling: transpose(0, 0) and permute(0, 1) move nothing, and
transpose(0, 1), permute(-1, -2) and T of a matrix are one and the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mono_quant_fx.graph.arguments import Arg, argument, rest

aten = torch.ops.aten
Axes = tuple[int, ...]
_Read = Callable[[fx.Node, int], Axes | None]


def permutation(node: fx.Node, dims: int) -> Axes | None:
    """The source's axis that each axis of the node's value is, for a source of `dims` axes; None for what is none.

    None as well where an axis is itself computed, is out of range or comes twice: such a call is left to fail.
    """
    read = _reader(node)
    axes = read(node, dims) if read is not None else None
    return axes if axes is not None and sorted(axes) == list(range(dims)) else None


def is_permutation(node: fx.Node) -> bool:
    """Whether a node is a call of this kind, whatever its arguments."""
    return _reader(node) is not None


def permuted(node: fx.Node) -> fx.Node:
    """The tensor whose axes a call of this kind reorders."""
    source: fx.Node = argument(node, _SOURCE)
    return source


def composed(first: Axes, then: Axes) -> Axes:
    """One permutation for two in turn."""
    return tuple(first[axis] for axis in then)


_SOURCE: Arg = (0, "input", "self")


def _reader(node: fx.Node) -> _Read | None:
    if node.op not in ("call_function", "call_method") or not isinstance(argument(node, _SOURCE), fx.Node):
        return None
    if node.target is getattr:
        return _PROPERTIES.get(str(node.args[1]))
    return _CALLS.get(node.target)


def _reversed(node: fx.Node, dims: int) -> Axes:
    return tuple(reversed(range(dims)))


def _last_two(node: fx.Node, dims: int) -> Axes | None:
    return None if dims < 2 else (*range(dims - 2), dims - 1, dims - 2)


def _matrix(node: fx.Node, dims: int) -> Axes | None:
    return _reversed(node, dims) if dims <= 2 else None


def _two(node: fx.Node, dims: int) -> Axes | None:
    pair = (argument(node, (1, "dim0", "axis0")), argument(node, (2, "dim1", "axis1")))
    found = _in_range(pair, dims)
    if found is None:
        return None
    axes = list(range(dims))
    axes[found[0]], axes[found[1]] = found[1], found[0]
    return tuple(axes)


def _all(node: fx.Node, dims: int) -> Axes | None:
    return _in_range(rest(node, (1, "dims")), dims)


def _moved(node: fx.Node, dims: int) -> Axes | None:
    come, go = (_in_range(argument(node, at), dims) for at in ((1, "source"), (2, "destination")))
    if come is None or go is None or len(come) != len(go) or len(set(go)) != len(go):
        return None
    others = iter(axis for axis in range(dims) if axis not in come)
    goal = dict(zip(go, come, strict=True))
    return tuple(goal[place] if place in goal else next(others, -1) for place in range(dims))


def _in_range(axes: Any, dims: int) -> Axes | None:
    """Axes counted from the front; None unless all of them are numbers of such."""
    listed = tuple(axes) if isinstance(axes, tuple | list) else (axes,)
    if not all(isinstance(a, int) and not isinstance(a, bool) and -dims <= a < dims for a in listed):
        return None
    return tuple(a % dims for a in listed)


_PROPERTIES: dict[str, _Read] = {"T": _reversed, "mT": _last_two, "H": _matrix, "mH": _last_two}


def _calls() -> dict[Any, _Read]:
    """Function, method, overload and packet -> how its arguments say which axis goes where (H: of real tensors)."""
    named = {
        _matrix: "t t_copy matrix_H",
        _reversed: "numpy_T",
        _last_two: "adjoint mT mH",
        _two: "transpose transpose_copy swapaxes swapdims",
        _all: "permute permute_copy",
        _moved: "movedim moveaxis",
    }
    found: dict[Any, _Read] = {}
    for read, names in named.items():
        for name in names.split():
            packet = getattr(aten, name)
            overloads = [getattr(packet, o) for o in packet.overloads()]
            plain = [o for o in overloads if not o._schema.is_mutable and "Dimname" not in str(o._schema)]
            found |= dict.fromkeys((name, packet, *plain), read)
            if hasattr(torch, name):
                found[getattr(torch, name)] = read
    return found


_CALLS = _calls()
