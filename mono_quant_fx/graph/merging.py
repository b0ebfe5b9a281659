"""Linears that read one input as one op on stacked rows, and the way back.

    linear   = int4_linear(x, q.weight_packed, ...)           merged = int4_linear(x, q_k.weight_packed, ...)
    linear_1 = int4_linear(x, k.weight_packed, ...)    <->    linear, linear_1 = split(merged, rows)

The stacked tensors are the only ones that are stored, so that every move of a module (to another device or dtype, a
copy, a load, an export) treats them like any other. A weight is some rows of them, and its annotation says which.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from mono_quant_fx import ops
from mono_quant_fx.graph.annotation import (
    MergedRows,
    QuantAnnotation,
    annotated,
    drop_annotation,
    get_annotation,
    set_annotation,
    stored_weight,
)
from mono_quant_fx.graph.free_names import LONGEST, free_base, free_name, shortened
from mono_quant_fx.graph.rewrite import VALUES, add_call, add_constant
from mono_quant_fx.graph.tensors import get_attribute, get_tensor

aten = torch.ops.aten

#: Op -> the place of its weight's codes; scale, zero point and bias follow.
_WEIGHT_AT: dict[Any, int] = {ops.int4_linear: 1, ops.int8_linear: 1, ops.w4a8_linear: 3, ops.w8a8_linear: 3}


class LinearCall(NamedTuple):
    """The arguments of a linear op: its input, the stored weight, the bias, and what is left (group size, compute)."""

    input: tuple[fx.Node, ...]
    stored: tuple[fx.Node | None, ...]
    bias: fx.Node | None
    options: tuple[Any, ...]

    @classmethod
    def read(cls, node: fx.Node) -> LinearCall | None:
        """None for a node that is no such op."""
        at = _WEIGHT_AT.get(node.target) if node.op == "call_function" else None
        if at is None or node.kwargs:
            return None
        return cls(node.args[:at], node.args[at : at + 3], node.args[at + 3], node.args[at + 4 :])  # type: ignore[arg-type]

    def outputs(self, gm: fx.GraphModule) -> int:
        """N, the rows of the weight."""
        assert self.stored[0] is not None
        return int(get_attribute(gm, str(self.stored[0].target)).shape[0])

    @property
    def args(self) -> tuple[Any, ...]:
        """Of the op."""
        return (*self.input, *self.stored, self.bias, *self.options)


def merge(gm: fx.GraphModule, nodes: Sequence[fx.Node], own_memory: bool, reserved: Collection[str] = ()) -> None:
    """Makes one op of these, in the place of the first, and each of them a piece of its result, in its own place.

    Args:
        nodes: linear ops of one kind with the same input and options, whose weights are annotated, whose biases are
            constants (or all None), and whose constants nothing else reads.
        own_memory: the pieces are copies; otherwise they are views, columns of the whole result.
        reserved: names that must not be given, beside those that the graph has.
    """
    calls = [call for node in nodes if (call := LinearCall.read(node)) is not None]
    annotations = [_annotation(call) for call in calls]
    endings = ("", "_packed", "_scale", "_zero_point")
    name = free_base(gm, _joined([a.weight for a in annotations]), endings, reserved)
    starts = [0, *accumulate(call.outputs(gm) for call in calls)]
    first, stack = nodes[0], _common_stack(nodes)
    with gm.graph.inserting_before(first):
        names = replace(annotations[0], merged=MergedRows(name, 0, starts[-1])).storage_names
        stored = [_stacked(gm, names[i], [call.stored[i] for call in calls]) for i in range(3)]
        bias = None
        if biases := [call.bias for call in calls if call.bias is not None]:
            bias = _stacked(gm, free_name(gm, _joined([str(b.target) for b in biases]), reserved), biases)
        merged = calls[0]._replace(stored=tuple(stored), bias=bias)
        whole = add_call(gm, first.target, merged.args, nodes, f"{first.name}_merged")
        op = aten.split_with_sizes_copy.default if own_memory else aten.split_with_sizes.default
        sizes = [stop - start for start, stop in pairwise(starts)]
        pieces = add_call(gm, op, (whole, sizes, -1), nodes, f"{first.name}_split")
    for new in (*stored, bias, whole, pieces):
        if new is not None and "nn_module_stack" in new.meta:
            new.meta["nn_module_stack"] = dict(stack)
    for i, (node, call, annotation) in enumerate(zip(nodes, calls, annotations, strict=True)):
        node.target, node.args = operator.getitem, (pieces, i)
        node.meta = {k: v for k, v in node.meta.items() if k not in VALUES}
        rows = MergedRows(name, starts[i], starts[i + 1], None if call.bias is None else str(call.bias.target))
        set_annotation(node, replace(annotation, merged=rows))


def merged_pieces(gm: fx.GraphModule) -> dict[str, list[tuple[str, int, int]]]:
    """Stacked tensor -> (name of its own, start, stop) of each part, in the order of their rows."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for node, annotation in annotated(gm):
        rows = annotation.merged
        if rows is None:
            continue
        call = LinearCall.read(node.all_input_nodes[0].all_input_nodes[0])
        assert call is not None
        names = [
            (str(stacked.target), own)
            for stacked, own in zip(call.stored, replace(annotation, merged=None).storage_names, strict=True)
            if stacked is not None
        ]
        if call.bias is not None and rows.bias is not None:
            names.append((str(call.bias.target), rows.bias))
        for stacked, own in names:
            found.setdefault(stacked, []).append((own, rows.start, rows.stop))
    return {name: sorted(parts, key=lambda part: part[1]) for name, parts in found.items()}


def unmerge(gm: fx.GraphModule) -> None:
    """Gives every merged weight its op, its name and memory of its own again."""
    for node, annotation in list(annotated(gm)):
        if annotation.merged is None:
            continue
        whole: Any = node.all_input_nodes[0].all_input_nodes[0]
        call = LinearCall.read(whole)
        assert call is not None
        own = replace(annotation, merged=None)
        with gm.graph.inserting_before(node):
            tensors = zip(own.storage_names, stored_weight(gm, annotation), strict=True)
            stored = [None if t is None else add_constant(gm, name, t.clone(), node) for name, t in tensors]
            bias = None if call.bias is None else _own_bias(gm, call.bias, annotation.merged, node)
        node.target, node.args = whole.target, call._replace(stored=tuple(stored), bias=bias).args
        drop_annotation(node)
        assert stored[0] is not None
        set_annotation(stored[0], own)


def _annotation(call: LinearCall) -> QuantAnnotation:
    packed = call.stored[0]
    annotation = None if packed is None else get_annotation(packed)
    assert annotation is not None
    return annotation


def _stacked(gm: fx.GraphModule, name: str, nodes: Sequence[fx.Node | None]) -> fx.Node | None:
    """The rows of all these constants as one constant."""
    own = [node for node in nodes if node is not None]
    tensors = [t for node in own if (t := get_tensor(gm, node)) is not None]
    if not tensors:
        return None
    whole = torch.cat([t.detach() for t in tensors])
    return add_constant(gm, name, _same_kind(whole, tensors[0]), own)


def _own_bias(gm: fx.GraphModule, whole: fx.Node, rows: MergedRows, like: fx.Node) -> fx.Node:
    tensor = get_tensor(gm, whole)
    assert tensor is not None and rows.bias is not None
    own = tensor.detach()[rows.start : rows.stop].clone()
    return add_constant(gm, rows.bias, _same_kind(own, tensor), like)


def _same_kind(tensor: Tensor, like: Tensor) -> Tensor:
    return nn.Parameter(tensor, like.requires_grad) if isinstance(like, nn.Parameter) else tensor


def _joined(names: Sequence[str]) -> str:
    """One name for several, by what they share at both ends; by the first of them where that would be long.

    >>> _joined(["attn.q.weight", "attn.k.weight", "attn.v.weight"]), _joined(["w", "v"])
    ('attn.q_k_v.weight', 'w_v')
    >>> _joined([f"experts.{i}.w1.weight" for i in range(2000)])
    'experts.0_and_1999_more.w1.weight'
    """
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts)) - 1
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    tail = next((i for i in range(shortest - head) if len({p[-1 - i] for p in parts}) > 1), shortest - head)
    middles = ["_".join(p[head : len(p) - tail]) for p in parts]
    middle = "_".join(middles)
    if len(middle) > LONGEST // 2:
        middle = f"{middles[0]}_and_{len(middles) - 1}_more"
    return ".".join([*parts[0][:head], shortened(middle), *parts[0][len(parts[0]) - tail :]])


def _common_stack(nodes: Sequence[fx.Node]) -> dict[str, Any]:
    """The modules whose forward made all of these."""
    first, *others = [node.meta.get("nn_module_stack") or {} for node in nodes]
    return {k: v for k, v in first.items() if all(k in other for other in others)}
