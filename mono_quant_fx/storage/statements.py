"""What a saved model's file says more than once: its plan, its table and its graph, compared with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.files.header import shown
from mono_quant_fx.graph.annotation import QuantAnnotation, annotated
from mono_quant_fx.graph.own_names import replaced
from mono_quant_fx.ops.registry import is_ours

#: Fields of an annotation that decide what its codes mean.
_MEANING = ("scheme", "layout", "groups", "shape", "dtype", "activations", "merged", "names", "lowered")
_QPARAMS = ("weight_scale", "weight_zero_point")


def table_faults(
    plan: Sequence[QuantAnnotation], table: AccuracyTable, tied: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """(weight, what is wrong) where the table shows another scheme than the plan has.

    Args:
        tied: as a CaptureRecord has it; the table's names are the user's own (see graph/own_names.py).
    """
    own = replaced(tied)
    named = [(own.get(entry.weight, entry.weight), entry) for entry in plan]
    schemes = {name: str(entry.scheme) for name, entry in named if entry.lowered and entry.scheme}
    rows = {row.weight for row in table.rows}
    left = {name for name, entry in named if not entry.lowered}
    for weight, scheme in schemes.items():
        if weight not in rows:
            yield weight, f"is {shown(scheme)} in the plan and has no row in the table"
    for row in table.rows:
        planned = schemes.get(row.weight)
        if planned is not None and row.scheme != planned:
            yield row.weight, f"is {shown(row.scheme)} in the table and {shown(planned)} in the plan"
        elif row.weight in left and row.scheme.startswith(("int4", "int8")):
            yield row.weight, f"is {shown(row.scheme)} in the table and not quantized in the plan"


def graph_faults(plan: Sequence[QuantAnnotation], gm: fx.GraphModule) -> Iterator[tuple[str, str]]:
    """(weight, what is wrong) where the graph in the file is another one than the plan is of."""
    planned, found = ({a.weight: a for a in entries} for entries in (plan, [a for _, a in annotated(gm)]))
    for weight in planned.keys() ^ found.keys():
        yield weight, f"is in the {'plan' if weight in planned else 'graph'} alone"
    for weight in planned.keys() & found.keys():
        for name in _MEANING:
            ours, theirs = getattr(planned[weight], name), getattr(found[weight], name)
            if ours != theirs:
                yield weight, f"has {name} {shown(str(ours))} in the plan and {shown(str(theirs))} in the graph"
    stored = {a.storage_names[0]: a for a in planned.values() if a.lowered}
    for node in gm.graph.nodes:
        given = _arguments(node) if is_ours(node.target) else {}
        entry = stored.get(_target(given.get("weight_packed", given.get("weight"))) or "")
        if entry is not None:
            yield from _call_faults(node, given, entry)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """What an operator of ours is called with, by name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _call_faults(node: fx.Node, given: dict[str, Any], entry: QuantAnnotation) -> Iterator[tuple[str, str]]:
    """Where the op that reads a weight's codes reads them otherwise than the plan has stored them."""
    assert entry.scheme is not None
    size = given.get("group_size")
    if size is not None and size != entry.scheme.group_size:
        yield entry.weight, f"is read by {node.name} in groups of {shown(size)}, and the plan has {entry.scheme}"
    wanted: dict[str, str | None] = dict(zip(_QPARAMS, entry.storage_names[1:], strict=False))
    if entry.scheme.symmetric:
        wanted["weight_zero_point"] = None
    for name, target in wanted.items():
        there = _target(given.get(name))
        if there != target:
            yield entry.weight, f"is read by {node.name} with {name} {shown(there)}, and the plan has {shown(target)}"


def _target(node: Any) -> str | None:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None
