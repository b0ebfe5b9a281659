"""A call's arguments by what they are, in every spelling: by place, or by one of the names that they go by."""

from __future__ import annotations

from typing import Any

from torch import fx

#: The place of an argument, and its names: torch's own, and those of other spellings of the op (aten's "self", say).
Arg = tuple[Any, ...]


def argument(node: fx.Node, at: Arg, default: Any = None) -> Any:
    """A call's argument; `default` where the call leaves it out."""
    place, *names = at
    if place < len(node.args):
        return node.args[place]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def set_argument(node: fx.Node, at: Arg, value: Any) -> None:
    """Gives a call another argument, where it has it or else by its first name."""
    place, *names = at
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(next((name for name in names if name in node.kwargs), names[0]), value)


def rest(node: fx.Node, at: Arg) -> Any:
    """What a method such as x.permute(1, 0) or x.permute((1, 0)) got from one place on: numbers or one sequence."""
    place, *_ = at
    if place < len(node.args) and not isinstance(node.args[place], tuple | list):
        return tuple(node.args[place:])
    return argument(node, at)
