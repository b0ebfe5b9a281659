"""Symbolic tracing of a copy of the model, and the opening of weight modules in graphs that exist."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from mono_quant_fx.frontend.randomness import NOT_TORCHS, Draws, FrozenRandomnessError, OtherDraws, own_generators
from mono_quant_fx.frontend.rebinding import check_traced
from mono_quant_fx.frontend.record import all_names
from mono_quant_fx.frontend.regions import open_regions
from mono_quant_fx.frontend.tracer import QuantTracer
from mono_quant_fx.frontend.tracing_lock import tracing
from mono_quant_fx.frontend.twins import twin
from mono_quant_fx.functionalization.functionalize import functionalize
from mono_quant_fx.graph.own_names import plain_names
from mono_quant_fx.graph.tensors import (
    attach,
    attribute_targets,
    clone,
    drop_unused,
    get_attribute,
    get_tensor,
    is_persistent,
)
from mono_quant_fx.graph.weight_ops import is_assertion
from mono_quant_fx.graph.weight_table import WEIGHT_MODULES


def trace(model: nn.Module, inputs: list[str] | None = None, positional: int | None = None) -> fx.GraphModule:
    """Symbolic tracing with QuantTracer, of a twin: what tracing and forward leave on a module stays there.

    Args:
        inputs, positional: as QuantTracer takes them.

    Raises:
        FrozenRandomnessError: forward draws random numbers that do not depend on an input; see randomness.py.
    """
    with tracing(), own_generators():
        others, draws = OtherDraws(), Draws(is_raising=False)
        gm = _traced(model, inputs, positional, draws)
        if draws.found or others.found:
            with own_generators(seed=_OTHER_SEED):
                again = _traced(model, inputs, positional, Draws(is_raising=False))
            if not _same_constants(gm, again):
                _traced(model, inputs, positional, Draws(is_raising=True))
                raise FrozenRandomnessError(NOT_TORCHS)
    return normalize(gm)


#: Of a second trace, whose constants differ where random numbers are in them.
_OTHER_SEED = 0x5EED


def _traced(model: nn.Module, inputs: list[str] | None, positional: int | None, draws: Draws) -> fx.GraphModule:
    model = twin(model)
    with draws:
        traced = QuantTracer(inputs, positional).trace(model)
    check_traced(model, traced)
    home = _with_plain_names(model, traced)
    gm = fx.GraphModule(home, traced)
    for target in attribute_targets(gm):
        if not is_persistent(home, target):  # torch.fx registers every buffer as a persistent one
            attach(gm, target, get_attribute(gm, target), persistent=False)
    return gm


def _with_plain_names(model: nn.Module, traced: fx.Graph) -> nn.Module:
    """The model, or what the graph reads of it under other names where torch.fx cannot write the model's own."""
    targets = dict.fromkeys(str(n.target) for n in traced.nodes if n.op in ("get_attr", "call_module"))
    plain = plain_names([*all_names(model), *targets])
    if not any(target in plain for target in targets):
        return model
    home = nn.Module()
    for target in targets:
        value = get_attribute(model, target)
        attach(home, plain.get(target, target), value, is_persistent(model, target))
    for node in traced.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = plain.get(node.target, node.target)
    return home


def _same_constants(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    """Whether two traces of a model hold the same calls on the same numbers."""
    nodes = [[(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in gm.graph.nodes] for gm in (a, b)]
    tensors = [[get_tensor(gm, n) for n in gm.graph.nodes if n.op == "get_attr"] for gm in (a, b)]
    return nodes[0] == nodes[1] and all(
        s is t or s is None or t is None or s.is_meta or (s.shape == t.shape and torch.equal(s, t))
        for s, t in zip(*tensors, strict=True)
    )


def normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """One get_attr node a tensor, functional, in a clone without the tracer's leftovers, in eval mode."""
    gm = clone(gm).train(False)
    first: dict[Any, fx.Node] = {}
    for node in list(gm.graph.nodes):
        tensor = get_tensor(gm, node)
        if tensor is None:
            continue
        same = first.setdefault(_identity(tensor), node)
        for user in [u for u in node.users if is_assertion(u)]:
            gm.graph.erase_node(user)  # it asserts what is known of a constant
        if same is not node:
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
    functionalize(gm)
    drop_unused(gm)
    gm.recompile()
    return gm


def _identity(tensor: Tensor) -> Any:
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def open_modules(gm: fx.GraphModule) -> fx.GraphModule:
    """Replaces each call of a weight module by what its forward does, and returns a normalized clone."""
    gm = clone(gm)
    open_regions(gm)
    for node in list(gm.graph.nodes):
        module = get_attribute(gm, node.target) if node.op == "call_module" else None
        if type(module) in WEIGHT_MODULES and not (isinstance(module, _ConvTransposeNd) and len(_given(node)) > 1):
            _open(gm, node, module)  # type: ignore[arg-type]
    return normalize(gm)


def _given(call: fx.Node) -> tuple[Any, ...]:
    return (*call.args, *call.kwargs.values())


def _open(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    bound = inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments
    with tracing():
        inner = QuantTracer(list(bound), len(node.args)).trace(module)
    values = {n: bound[str(n.target)] for n in inner.nodes if n.op == "placeholder"}
    last = node.prev
    with gm.graph.inserting_before(node):
        result = gm.graph.graph_copy(inner, values)
    while node.prev is not last:
        last = last.next
        _adopt(last, node, module)
    node.replace_all_uses_with(result)  # type: ignore[arg-type]
    gm.graph.erase_node(node)


def _adopt(new: fx.Node, call: fx.Node, module: nn.Module) -> None:
    path = str(call.target)
    if new.op == "get_attr":
        new.target = f"{path}.{new.target}"
    stack = dict(call.meta.get("nn_module_stack") or {})
    stack[path] = (path, type(module))
    new.meta = {**call.meta, "nn_module_stack": stack}
