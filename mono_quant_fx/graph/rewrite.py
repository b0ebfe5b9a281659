"""Nodes that a pass adds: each takes over the meta of the node it stands for, without values and annotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import drop_annotation
from mono_quant_fx.graph.provenance import stand_for

#: Keys under which torch keeps a node's value; a new node has another.
VALUES = ("val", "tensor_meta", "example_value")

#: The node that a new one stands for; of several, the first gives its meta.
Like = fx.Node | Sequence[fx.Node]


def add_constant(gm: fx.GraphModule, name: str, tensor: Tensor, like: Like) -> fx.Node:
    """Stores a tensor under a dotted name and reads it at the insertion point."""
    tensors.attach(gm, name, tensor)
    return _take_meta(gm.graph.get_attr(name), like)


def add_call(gm: fx.GraphModule, op: Any, args: tuple[Any, ...], like: Like, name: str | None = None) -> fx.Node:
    """Calls `op` at the insertion point."""
    return _take_meta(gm.graph.call_function(op, args, name=name), like)


def _take_meta(node: fx.Node, like: Like) -> fx.Node:
    sources = [like] if isinstance(like, fx.Node) else like
    node.meta = {k: v for k, v in sources[0].meta.items() if k not in VALUES}
    drop_annotation(node)
    stand_for(node, sources)
    return node
