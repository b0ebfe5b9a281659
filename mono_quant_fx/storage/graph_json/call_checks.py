"""The arguments of a stored graph's calls: what torch takes on trust, or torch.fx writes as syntax, is checked here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from mono_quant_fx.errors import GraphFormatError
from mono_quant_fx.storage.graph_json import allowed_calls
from mono_quant_fx.storage.graph_json.calls import is_method
from mono_quant_fx.storage.graph_json.checked_calls import LARGEST, bounded
from mono_quant_fx.storage.graph_json.values import show

_ATTRIBUTES = frozenset(allowed_calls.ATTRIBUTES.split())
#: How many arguments torch.fx writes down for a call of `operator`, whatever the node holds.
_ARITY = MappingProxyType(
    {
        **{name: template.count("{}") for name, template in fx.graph.magic_methods.items()},
        **{name: template.count("{}") for name, template in fx.graph.inplace_methods.items()},
    }
)
#: Types of a schema that the dispatcher also takes as integers, which it compares with nothing.
_BY_NUMBER: Mapping[str, type] = MappingProxyType(
    {"ScalarType": torch.dtype, "Layout": torch.layout, "MemoryFormat": torch.memory_format, "Generator": type(None)}
)
#: Integers that stand for one of a few names, by their name in a schema -> the largest.
_CHOICES = MappingProxyType({"reduction": 2, "interpolation_mode": 2, "padding_mode": 2})


def check_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The rules for calls of functions.

    Raises:
        GraphFormatError: getattr of anything but a known attribute of a node; an operator of Python with too few or too
            many arguments; an output that is passed in; a number where torch expects a type, a layout or a choice;
            a convolution's window that is computed, or past what kernels reckon with.
    """
    if kwargs.get("out") is not None:
        raise GraphFormatError(f"its argument out is {show(kwargs['out'])}; a stored graph may not write into one")
    name = str(getattr(target, "__name__", "")).partition(".")[0]
    if name.startswith("conv"):
        _check_window(args[3:], {k: v for k, v in kwargs.items() if k not in ("input", "self", "weight", "bias")})
    if target is getattr:
        _check_getattr(args, kwargs)
    elif isinstance(target, OpOverload):
        _check_operator(target, args, kwargs)
    elif getattr(target, "__module__", None) == "_operator":
        _check_python_operator(target.__name__, args, kwargs)


def _check_window(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    values = (*args, *kwargs.values())
    if any(isinstance(v, fx.Node) for v in pytree.tree_leaves(values)) or not bounded(values):
        raise GraphFormatError(f"its window is {show(values)}; numbers of at most {LARGEST}, written out, are needed")


def _check_getattr(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    known = len(args) == 2 and isinstance(args[1], str) and args[1] in _ATTRIBUTES
    if not known or kwargs or not isinstance(args[0], fx.Node):
        raise GraphFormatError(
            f"getattr reads {show(args[1] if len(args) > 1 else None)}; it may be {allowed_calls.ATTRIBUTES}, of a node"
        )


def _check_python_operator(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    wanted = _ARITY.get(name)
    if wanted is not None and (len(args) != wanted or kwargs):
        raise GraphFormatError(f"operator.{name} takes {wanted} arguments, not {len(args)} and {len(kwargs)} by name")
    if name in fx.graph.inplace_methods and not isinstance(args[0], fx.Node):
        raise GraphFormatError(f"operator.{name} writes into {show(args[0])}, which is no node")


def _check_operator(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    known = {argument.name: argument for argument in target._schema.arguments}
    positional = [argument.name for argument in target._schema.arguments if not argument.kwarg_only]
    strange = [name for name in kwargs if name not in known or name in positional[: len(args)]]
    if len(args) > len(positional) or strange:
        raise GraphFormatError(
            f"{target} takes {', '.join(known)}; {len(args)} are given, and {show([*kwargs])} by name"
        )
    for name, value in (*zip(positional, args, strict=False), *kwargs.items()):
        kind = str(known[name].real_type).removeprefix("Optional[").removesuffix("]")
        if kind in _BY_NUMBER and value is not None and type(value) is not _BY_NUMBER[kind]:
            raise GraphFormatError(f"its argument {name} is {show(value)}; a {kind}, written out, is needed")
        if kind == "int" and name in _CHOICES and not (type(value) is int and 0 <= value <= _CHOICES[name]):
            raise GraphFormatError(f"its argument {name} is {show(value)}; it is one of 0 .. {_CHOICES[name]}")


def check_method(name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A method on the list, called on a node, that does not take its bytes for another type.

    Raises:
        GraphFormatError: it is not.
    """
    if not is_method(name):
        raise GraphFormatError(f"it calls the method {show(name)}, which is not among those a stored graph may call")
    if not args or not isinstance(args[0], fx.Node):
        raise GraphFormatError(f"it calls .{name} on {show(args[0] if args else None)}; a method needs a node")
    if kwargs.get("out") is not None:
        raise GraphFormatError(f"its argument out is {show(kwargs['out'])}; a stored graph may not write into one")
    types = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    if name == "view" and types:
        raise GraphFormatError(f"it views bytes as {types[0]}; a stored graph may only convert them, with .to")
