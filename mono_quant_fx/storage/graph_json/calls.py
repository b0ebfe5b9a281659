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
from torch._ops import OpOverload, OpOverloadPacket

from mono_quant_fx.errors import GraphFormatError
from mono_quant_fx.functionalization import pure_writes
from mono_quant_fx.ops.registry import NAMESPACE
from mono_quant_fx.storage.graph_json import allowed_calls
from mono_quant_fx.storage.graph_json.allowed_aten import ATEN, ATEN_OVERLOADS_REFUSED
from mono_quant_fx.storage.graph_json.checked_calls import CHECKED
from mono_quant_fx.storage.graph_json.values import show

_HOMES = MappingProxyType(
    {
        "torch.nn.functional": torch.nn.functional,
        "torch": torch,
        "torch.fft": torch.fft,
        "torch.linalg": torch.linalg,
        "torch.special": torch.special,
        "pure_writes": pure_writes,
        "operator": operator,
        "math": math,
        "builtins": builtins,
    }
)
_METHODS = frozenset((*allowed_calls.METHODS.split(), *allowed_calls.METHODS_IN_PLACE.split()))
#: namespace of the dispatcher -> the operators of it.
_OPERATORS = MappingProxyType(
    {
        "aten": frozenset(name for names in ATEN.values() for name in names.split()),
        NAMESPACE: frozenset(allowed_calls.OWN.split()),
    }
)
_OVERLOADS_REFUSED = frozenset(ATEN_OVERLOADS_REFUSED.split())


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
    found = {function: name for name, function in reversed(_functions().items())}
    return found | {function: name for name, function in CHECKED.items()}


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
    """The function or operator overload of a name; with a look at its arguments where torch takes them on trust.

    Raises:
        GraphFormatError: the list does not hold the name.
    """
    found = (CHECKED.get(name) or _functions().get(name) or _overload(name)) if isinstance(name, str) else None
    if found is None:
        raise GraphFormatError(f"it calls {show(name)}, which is not among the functions that a stored graph may call")
    return found


def _overload(name: str) -> OpOverload | None:
    """The overload that "namespace.op.overload" names, if a stored graph may call it."""
    namespace, _, rest = name.partition(".")
    op, _, overload = rest.partition(".")
    known = op in _OPERATORS.get(namespace, ()) and rest not in _OVERLOADS_REFUSED
    packet = getattr(getattr(torch.ops, namespace), op, None) if known else None
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():
        return None
    found = getattr(packet, overload)
    # TorchScript has operators under the same namespace (aten::save among them) that the dispatcher does not know
    in_dispatcher = torch._C._dispatch_has_kernel(
        found._schema.name + ("" if overload == "default" else f".{overload}")
    )
    return found if in_dispatcher and not any(a.is_out for a in found._schema.arguments) else None


@functools.cache
def allowed_operators() -> tuple[OpOverload, ...]:
    """Every overload that a stored graph may call, in the order of the lists."""
    found = []
    for namespace, names in _OPERATORS.items():
        for op in sorted(names):
            packet = getattr(getattr(torch.ops, namespace), op, None)
            overloads = packet.overloads() if isinstance(packet, OpOverloadPacket) else []
            found += [_overload(f"{namespace}.{op}.{overload}") for overload in overloads]
    return tuple(overload for overload in found if overload is not None)


def is_method(name: Any) -> bool:
    """Whether a stored graph may call the tensor method of this name."""
    return isinstance(name, str) and name in _METHODS
