"""Calls by name: what a node of a graph calls, as text that can be stored, and back through one allow-list."""

from __future__ import annotations

import builtins
import functools
import math
import operator
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from mono_quant_fx import allowed_calls
from mono_quant_fx.errors import GraphFormatError
from mono_quant_fx.json_values import show
from mono_quant_fx.ops.registry import NAMESPACE

_HOMES = MappingProxyType(
    {
        "torch.nn.functional": torch.nn.functional,
        "torch": torch,
        "torch.fft": torch.fft,
        "torch.linalg": torch.linalg,
        "torch.special": torch.special,
        "operator": operator,
        "math": math,
        "builtins": builtins,
    }
)
_METHODS = frozenset(allowed_calls.METHODS.split())
_ATTRIBUTES = frozenset(allowed_calls.ATTRIBUTES.split())
_PRIVATE = frozenset(allowed_calls.ATEN_PRIVATE.split())
_REFUSED = frozenset(allowed_calls.ATEN_REFUSED.split())


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Every function of the list under its name; names that this torch does not have are left out."""
    found = {
        f"{home}.{name}": getattr(_HOMES[home], name)
        for home, names in allowed_calls.FUNCTIONS.items()
        for name in names.split()
        if hasattr(_HOMES[home], name)
    }
    for name in allowed_calls.HIGHER_ORDER.split():
        if hasattr(torch.ops.higher_order, name):
            found[f"higher_order.{name}"] = getattr(torch.ops.higher_order, name)
    return found


@functools.cache
def _names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in reversed(_functions().items())}


def function_name(target: Any) -> str | None:
    """The name that `function_of` resolves to `target`; None where the list does not hold it.

    >>> function_name(torch.nn.functional.relu), function_name(torch.ops.aten.add.Tensor), function_name(print)
    ('torch.nn.functional.relu', 'aten.add.Tensor', None)
    """
    if isinstance(target, OpOverload):
        name = str(target)
        return name if _overload(name) is target else None
    try:
        return _names().get(target)
    except TypeError:  # not hashable
        return None


def function_of(name: Any) -> Callable[..., Any]:
    """The function or operator overload of a name.

    Raises:
        GraphFormatError: the list does not hold the name.
    """
    found = (_functions().get(name) or _overload(name)) if isinstance(name, str) else None
    if found is None:
        raise GraphFormatError(f"it calls {show(name)}, which is not among the functions that a stored graph may call")
    return found


def _overload(name: str) -> OpOverload | None:
    """The overload that "namespace.op.overload" names, if a stored graph may call it."""
    namespace, _, rest = name.partition(".")
    op, _, overload = rest.partition(".")
    words_only = op.isidentifier() and overload.isidentifier() and name.isascii() and len(name) <= 200
    if namespace not in ("aten", NAMESPACE) or not words_only or (namespace == "aten" and not _is_plain(op)):
        return None
    packet = getattr(getattr(torch.ops, namespace), op, None)
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():
        return None
    found = getattr(packet, overload)
    # TorchScript has operators under the same namespace (aten::save among them) that the dispatcher does not know
    in_dispatcher = torch._C._dispatch_has_kernel(
        found._schema.name + ("" if overload == "default" else f".{overload}")
    )
    return found if in_dispatcher and not any(a.is_out for a in found._schema.arguments) else None


def _is_plain(op: str) -> bool:
    if op.startswith("_"):
        return op in _PRIVATE
    return not (op in _REFUSED or op.startswith(allowed_calls.ATEN_REFUSED_STARTS) or "backward" in op)


def is_method(name: Any) -> bool:
    """Whether a stored graph may call the tensor method of this name."""
    return isinstance(name, str) and name in _METHODS


#: How many arguments torch.fx writes down for a call of `operator`, whatever the node holds.
_ARITY = MappingProxyType(
    {
        **{name: template.count("{}") for name, template in fx.graph.magic_methods.items()},
        **{name: template.count("{}") for name, template in fx.graph.inplace_methods.items()},
    }
)


def check_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The rules for calls that torch.fx writes as Python syntax instead of a function call.

    Raises:
        GraphFormatError: getattr of anything but a known attribute of a node, or an operator with too few or too many
            arguments.
    """
    if target is getattr:
        known = len(args) == 2 and isinstance(args[1], str) and args[1] in _ATTRIBUTES
        if not known or kwargs or not isinstance(args[0], fx.Node):
            raise GraphFormatError(
                f"getattr reads {show(args[1] if len(args) > 1 else None)}; it may be {allowed_calls.ATTRIBUTES}, "
                "of a node"
            )
    elif getattr(target, "__module__", None) == "_operator":
        name = target.__name__
        wanted = _ARITY.get(name)
        if wanted is not None and (len(args) != wanted or kwargs):
            raise GraphFormatError(
                f"operator.{name} takes {wanted} arguments, not {len(args)} and {len(kwargs)} by name"
            )
        if name in fx.graph.inplace_methods and not isinstance(args[0], fx.Node):
            raise GraphFormatError(f"operator.{name} writes into {show(args[0])}, which is no node")


def check_method(name: Any, args: tuple[Any, ...]) -> None:
    """A method on the list, called on a node.

    Raises:
        GraphFormatError: neither.
    """
    if not is_method(name):
        raise GraphFormatError(f"it calls the method {show(name)}, which is not among those a stored graph may call")
    if not args or not isinstance(args[0], fx.Node):
        raise GraphFormatError(f"it calls .{name} on {show(args[0] if args else None)}; a method needs a node")
