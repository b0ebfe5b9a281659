"""Embeddings with a max_norm: the model shortens rows of its weight as it looks them up; a graph shortens what it got.

A row that is shortened once stays as it is, so both give the same, and the weight remains a constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.calls import place_of

aten = torch.ops.aten
_BAGS = (F.embedding_bag, aten.embedding_bag.default, aten.embedding_bag.padding_idx)
#: What torch adds to a row's length before it divides by it.
_ADD, _EPSILON = aten.add.Scalar, 1e-7
_ROWS = (F.embedding, aten.embedding.default)


def renormalize_rows(gm: fx.GraphModule) -> None:
    """Of every weight that is read by such lookups alone, all with one max_norm; others are written as before."""
    for weight in [n for n in gm.graph.nodes if n.op == "get_attr" and tensors.get_tensor(gm, n) is not None]:
        views = [weight, *(u for u in weight.users if u.target is aten.detach.default)]
        readers = [u for view in views for u in view.users if u not in views]
        asked = [_asked(reader) for reader in readers]
        norms = {norm for norm in asked if norm is not None}
        lookups = [r for r in readers if r.target in (*_ROWS, *_BAGS)]
        writers = [r for r in readers if r.target is aten.embedding_renorm_.default]
        if len(norms) != 1 or len(lookups) + len(writers) != len(readers) or not _all_asked(lookups, writers, asked):
            continue
        ((maximum, kind),) = norms
        for lookup in lookups:
            _shorten(gm, lookup, weight, maximum, kind)
        for writer in writers:
            gm.graph.erase_node(writer)


def _all_asked(lookups: list[fx.Node], writers: list[fx.Node], asked: list[Any]) -> bool:
    """Whether each lookup has its rows shortened: by itself, or by a call of its own before it."""
    if not writers:
        return None not in asked
    indices = [writer.args[1] for writer in writers]
    return all(_indices(lookup) in indices for lookup in lookups)


def _indices(lookup: fx.Node) -> Any:
    return lookup.args[1] if len(lookup.args) > 1 else None


def _asked(node: fx.Node) -> tuple[Any, Any] | None:
    """(max_norm, norm_type)."""
    if node.target is aten.embedding_renorm_.default:
        return node.args[2], node.args[3]
    if node.target in (F.embedding, F.embedding_bag):
        maximum = _value(node, "max_norm", None)
        return None if maximum is None else (maximum, _value(node, "norm_type", 2.0))
    return None


def _value(node: fx.Node, name: str, default: Any) -> Any:
    at = place_of(node.target, name)
    return node.args[at] if at is not None and at < len(node.args) else node.kwargs.get(name, default)


def _shorten(gm: fx.GraphModule, lookup: fx.Node, weight: fx.Node, maximum: Any, kind: Any) -> None:
    """Rows after the lookup; of a bag, which adds them up, the whole weight before it."""
    at = place_of(lookup.target, "max_norm")
    if at is not None:
        lookup.args = tuple(None if i == at else a for i, a in enumerate(lookup.args))
        lookup.kwargs = {k: v for k, v in lookup.kwargs.items() if k != "max_norm"}
    rows = weight if lookup.target in _BAGS else lookup
    before = lookup if rows is weight else lookup.next
    with gm.graph.inserting_before(before):
        length = gm.graph.call_function(aten.linalg_vector_norm.default, (rows, kind, [-1], True))
        inverse = gm.graph.call_function(aten.reciprocal.default, (gm.graph.call_function(_ADD, (length, _EPSILON)),))
        factor = gm.graph.call_function(
            aten.clamp_max.default, (gm.graph.call_function(aten.mul.Scalar, (inverse, maximum)), 1.0)
        )
        short = gm.graph.call_function(aten.mul.Tensor, (rows, factor))
    if rows is weight:
        lookup.replace_input_with(weight, short)
    else:
        lookup.replace_all_uses_with(short, lambda user: user not in (length, short))
    for node in (length, length.next, inverse, inverse.next, factor, short):
        node.meta = {k: v for k, v in lookup.meta.items() if k != "val" or (node is short and rows is lookup)}
