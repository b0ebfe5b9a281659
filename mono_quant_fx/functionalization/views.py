"""Views in a functional graph: the same view of a changed tensor, and a changed view put back into its tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mono_quant_fx.functionalization.pure_writes import Method, Through, set_item, set_piece
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.calls import call_name, first_argument
from mono_quant_fx.graph.effect_tables import words
from mono_quant_fx.graph.free_names import free_name

aten = torch.ops.aten

#: Number the same elements in the same order, so that a reshape leads back.
_RESHAPES = words(
    "view view_as reshape reshape_as flatten ravel unflatten squeeze unsqueeze contiguous _unsafe_view atleast_1d "
    "atleast_2d atleast_3d Flatten Unflatten detach alias data to type type_as lift_fresh"
)
#: Are their own inverse.
_SWAPS = words("transpose swapaxes swapdims t T mT H mH adjoint numpy_T matrix_H conj")
#: Have an operator that writes through them: select_scatter(tensor, value, dim, index).
_SCATTERS = {name: getattr(aten, f"{name}_scatter").default for name in ("select", "slice", "diagonal")}


def again(step: fx.Node, now: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """The view `step` of what its inputs stand for by now; at the insertion point.

    A view of a functional graph need not share memory, so it is a reshape, which takes any strides.
    """
    graph_ = step.graph
    copy = graph_.node_copy(step, now)
    is_cast = any(isinstance(a, torch.dtype) for a in step.args)
    if not is_cast and step.target in ("view", "view_as"):
        copy.target = {"view": "reshape", "view_as": "reshape_as"}[str(step.target)]
    if step.target is aten.view.default:
        copy.target = aten.reshape.default
    return copy


def put_back(step: fx.Node, before: fx.Node, value: fx.Node) -> fx.Node:
    """The tensor of a view after the view was changed, at the insertion point.

    Args:
        step: the view of one tensor.
        before: the tensor before the change.
        value: what the view is now.
    """
    graph_, name = step.graph, call_name(step)
    rest = step.args[1:]
    if step.target is getattr:
        rest = ()
    if step.op == "call_module":
        name = type(tensors.get_attribute(graph_.owning_module, str(step.target))).__name__  # type: ignore[arg-type]
    if name in _RESHAPES and not any(isinstance(a, torch.dtype) for a in step.args):
        return graph_.call_function(aten.reshape_as.default, (value, before))
    if name in _SWAPS:
        return graph_.node_copy(step, lambda n: value if n in step.all_input_nodes[:1] else n)
    if step.target is operator.getitem:
        return graph_.call_function(set_item, (before, step.args[1], value))
    order = _order(step)
    if order is not None:
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return graph_.call_function(aten.permute.default, (value, inverse))
    if name in _SCATTERS and step.op != "call_module":
        kwargs = {k: v for k, v in step.kwargs.items() if k not in ("input", "self")}
        return graph_.call_function(_SCATTERS[name], (before, value, *rest), kwargs)
    return _through(step, before, value)


def put_back_piece(pieces: fx.Node, at: int, value: fx.Node) -> fx.Node:
    """The same for one piece of a split; `pieces` takes apart the tensor before the change."""
    name = call_name(pieces)
    dims = {"hsplit": 1, "vsplit": 0, "dsplit": 2}
    at_dim = 1 if name == "unbind" else 2
    dim = pieces.args[at_dim] if len(pieces.args) > at_dim else pieces.kwargs.get("dim", dims.get(name, 0))
    if name == "unbind":
        return pieces.graph.call_function(aten.select_scatter.default, (first_argument(pieces), value, dim, at))
    return pieces.graph.call_function(set_piece, (pieces, at, value, dims.get(name, dim)))


def _order(step: fx.Node) -> list[int] | None:
    """The permutation of a permute, counted from 0, where it is spelt out."""
    if call_name(step) != "permute":
        return None
    given: Any = step.kwargs.get("dims", step.args[1:])
    flat = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    if not all(isinstance(d, int) for d in flat):
        return None
    return [d % len(flat) for d in flat]


def _through(step: fx.Node, before: fx.Node, value: fx.Node) -> fx.Node:
    owner: Any = step.graph.owning_module
    call: Any = step.target
    rest, kwargs = step.args[1:], {k: v for k, v in step.kwargs.items() if k not in ("input", "self")}
    if step.op == "call_method":
        call = Method(str(step.target))
    elif step.op == "call_module":
        call = tensors.get_attribute(owner, str(step.target))
    elif step.target is getattr:
        call, rest = operator.attrgetter(str(step.args[1])), ()
    name = free_name(owner, f"write_through_{call_name(step) or step.name}")
    tensors.attach(owner, name, Through(call).eval())
    return step.graph.call_module(name, (before, value, *rest), kwargs)
