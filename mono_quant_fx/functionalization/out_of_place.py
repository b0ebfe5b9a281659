"""One call that writes, as a call that does not: the same node gives the new value instead of writing it."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils import _pytree as pytree

from mono_quant_fx.errors import CaptureError
from mono_quant_fx.functionalization.pure_writes import Method, OnCopies, set_item
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.calls import (
    augmented,
    call_name,
    first_argument,
    is_flagged,
    module_of,
    nodes_in,
    place_of,
)
from mono_quant_fx.graph.free_names import free_name

aten = torch.ops.aten

#: Writes whose counterpart goes by another name.
_OTHERS: dict[str, Any] = {
    "copy_": aten.copy.default,
    "fill_": torch.fill,
    "zero_": torch.zeros_like,
    "bernoulli_": aten.bernoulli.p,
    "uniform_": aten.uniform.default,
    "normal_": aten.normal_functional.default,
    "exponential_": aten.exponential.default,
    "geometric_": aten.geometric.default,
    "cauchy_": aten.cauchy.default,
    "log_normal_": aten.log_normal.default,
}
#: Change what a tensor is made of.
_REFUSED = frozenset(("set_", "resize_", "resize_as_", "apply_", "map_", "map2_", "share_memory_", "as_strided_"))


def value_instead(node: fx.Node, targets: list[fx.Node], cast: bool) -> dict[fx.Node, fx.Node] | None:
    """Makes `node` give what it wrote into `targets`; target -> the node of its new value, made right after it.

    Args:
        node: its arguments are what the model's names stand for by now.
        targets: the arguments that it writes.
        cast: the value may have another type than what it is written into.

    Returns:
        None where torch has no such call; see on_copies.

    Raises:
        CaptureError: a write that changes a tensor's size or storage.
    """
    name = call_name(node)
    if name in _REFUSED:
        raise CaptureError(f"{node.name}: {name} changes the size or the memory of a tensor, which no graph can hold")
    if node.kwargs.get("out") is not None:
        return _without_out(node, cast)
    if len(targets) != 1 or targets[0] is not first_argument(node) or not _retarget(node, name):
        return None
    return {targets[0]: _as(node, targets[0], cast)}


def on_copies(node: fx.Node, targets: list[fx.Node], kept: list[fx.Node]) -> tuple[fx.Node, dict[fx.Node, fx.Node]]:
    """(the call's result, target -> its copy after the call): calls what `node` calls on copies of the targets.

    Args:
        kept: further arguments that are written where they are.
    """
    owner: Any = node.graph.owning_module
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    copied = [i for i, leaf in enumerate(leaves) if leaf in targets]
    call = Method(str(node.target)) if node.op == "call_method" else node.target
    if node.op == "call_module":
        call = module_of(node)
    written = [i for i, n in enumerate(node.all_input_nodes) if n in kept]
    place = free_name(owner, f"{node.name}_on_copies")
    tensors.attach(owner, place, OnCopies(call, copied, written).eval())  # type: ignore[arg-type]
    with node.graph.inserting_before(node):
        called = _like(node.graph.call_module(place, node.args, node.kwargs), node)
        result = _like(node.graph.call_function(operator.getitem, (called, 0)), node)
        found = {}
        for i, at in enumerate(copied):
            found[leaves[at]] = _like(node.graph.call_function(operator.getitem, (called, i + 1)), node)
    return result, found


def _like(new: fx.Node, node: fx.Node) -> fx.Node:
    new.meta = {k: v for k, v in node.meta.items() if k != "val"}
    return new


def _without_out(node: fx.Node, cast: bool) -> dict[fx.Node, fx.Node] | None:
    given = node.kwargs["out"]
    if isinstance(node.target, torch._ops.OpOverload):
        plain = counterpart(node.target)
        if plain is None:
            return None
        node.target = plain
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "out"}
    if isinstance(given, fx.Node):
        return {given: _as(node, given, cast)}
    found = {}
    with node.graph.inserting_after(node):
        for i, target in enumerate(nodes_in(given)):
            found[target] = _like(node.graph.call_function(operator.getitem, (node, i)), node)
    return {target: _as(value, target, cast) for target, value in found.items()}


def _retarget(node: fx.Node, name: str) -> bool:
    """Whether the call could be changed to one that gives the value."""
    if node.op == "call_module":
        module = module_of(node)
        is_one = getattr(module, "inplace", None) is True
        if is_one:
            module.inplace = False  # type: ignore[assignment]
        return is_one
    if node.target is operator.setitem or name == "__setitem__":
        if isinstance(node.args[1], str):
            raise CaptureError(f"{node.name}: forward writes into a dict that it was given, which no graph can hold")
        node.op, node.target = "call_function", set_item
        return True
    if node.op == "call_function" and is_flagged(node):
        _unflag(node)
        return True
    plain = augmented(node)
    if plain is not None:
        node.op, node.target = "call_function", plain
        return True
    if not name.endswith("_"):
        return False
    return _rename(node, name)


def _unflag(node: fx.Node) -> None:
    at = place_of(node.target, "inplace")
    if at is not None and at < len(node.args):
        node.args = (*node.args[:at], False, *node.args[at + 1 :])
    else:
        node.kwargs = {**node.kwargs, "inplace": False}


def _rename(node: fx.Node, name: str) -> bool:
    found: Any
    if isinstance(node.target, torch._ops.OpOverload):
        found = counterpart(node.target)
    elif name in _OTHERS:
        found = _OTHERS[name]
        node.op = "call_function"
        if name == "bernoulli_" and len(node.args) == 1 and "p" not in node.kwargs:
            node.args = (node.args[0], 0.5)
    elif node.op == "call_method":
        found = name[:-1] if hasattr(torch.Tensor, name[:-1]) else None
    else:
        homes = [home for home in (F, torch, torch.Tensor) if getattr(home, name, None) == node.target]
        found = next((getattr(home, name[:-1]) for home in homes if hasattr(home, name[:-1])), None)
    if found is None:
        return False
    node.target = found
    node._rename(name[:-1])
    return True


@functools.cache
def counterpart(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """aten.add.Tensor for aten.add_.Tensor and aten.add.out: takes the same, and writes nothing."""
    name = op._schema.name.partition("::")[2]
    marked = [a for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    is_plain = all(a.is_out for a in marked) or marked == op._schema.arguments[:1]
    if op.namespace != "aten" or not is_plain:
        return None
    base = {"normal_": "normal_functional"}.get(name, name.removesuffix("_"))
    packet = getattr(torch.ops.aten, base, None)
    wanted = [str(a.type) for a in op._schema.arguments if not a.is_out]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        if not found._schema.is_mutable and [str(a.type) for a in found._schema.arguments] == wanted:
            return found
    return None


def _as(value: fx.Node, target: fx.Node, cast: bool) -> fx.Node:
    """The value in the type of what is written, which a write never changes."""
    if not cast:
        return value
    with value.graph.inserting_after(value):
        if isinstance(value.target, torch._ops.OpOverload):
            return _like(value.graph.call_function(aten.type_as.default, (value, target)), value)
        return _like(value.graph.call_method("type_as", (value, target)), value)
