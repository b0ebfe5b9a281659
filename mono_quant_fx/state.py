"""Which tensors a graph writes in place: a key-value cache, a running state. They are no constants."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from mono_quant_fx import graph


def written(gm: fx.GraphModule) -> list[fx.Node]:
    """The get_attr nodes whose tensor some node writes in place, itself or through a view, in execution order."""
    found = {source for node in gm.graph.nodes for value in writes(node) for source in _origin(value)}
    return [node for node in gm.graph.nodes if node in found]


def own_state(gm: fx.GraphModule) -> None:
    """Gives `gm` copies of the buffers that it writes, so that running it leaves no trace in whoever shares them."""
    for target in dict.fromkeys(str(node.target) for node in written(gm)):
        value = graph.get_attribute(gm, target)
        if not isinstance(value, nn.Parameter):
            graph.attach(gm, target, value.clone(), graph.is_persistent(gm, target))


def writes(node: fx.Node) -> list[fx.Node]:
    """The values that a call writes, by torch's schemas: aten.index_copy_(Tensor(a!) self, ...) writes its first."""
    first = [a for a in node.args[:1] if isinstance(a, fx.Node)]
    if node.op == "call_module":
        inner = graph.get_attribute(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]
        return first if getattr(inner, "inplace", False) is True else []
    if node.target is operator.setitem or node.kwargs.get("inplace") is True:
        return first
    marked = [i for i, info in _aliases(node) if info.is_write]
    return [a for i in marked for a in node.args[i : i + 1] if isinstance(a, fx.Node)]


def _origin(value: fx.Node) -> list[fx.Node]:
    """The get_attr node that `value` is, or is a view of."""
    while value.op != "get_attr":
        is_view = value.target in (operator.getitem, getattr) or any(i == 0 for i, _ in _aliases(value))
        if not (is_view and value.args and isinstance(value.args[0], fx.Node)):
            return []
        value = value.args[0]
    return [value]


def _aliases(node: fx.Node) -> Iterator[tuple[int, Any]]:
    """(place, alias info) of each argument that a call writes or returns a view of, by any overload of its name."""
    if node.op not in ("call_function", "call_method"):
        return
    if isinstance(node.target, torch._ops.OpOverload):
        schemas = [node.target._schema]
    else:
        packet = getattr(torch.ops.aten, str(getattr(node.target, "__name__", node.target)), None)
        schemas = [getattr(packet, name)._schema for name in packet.overloads()] if packet is not None else []
    for schema in schemas:
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and not argument.is_out:
                yield i, argument.alias_info
