"""What a drawing says about each node: its lines, its colour, its figure, its tooltip. Constants fold into readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from mono_quant_fx.accuracy.row import AccuracyRow, db
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.graph.annotation import QuantAnnotation, annotated, get_annotation
from mono_quant_fx.graph.tensors import get_tensor, module_path, module_stack, op_name
from mono_quant_fx.graph.text import format_node
from mono_quant_fx.ops.registry import is_ours

#: Deeper module paths are drawn in the group of this depth.
MAX_DEPTH = 12


@dataclass(frozen=True)
class Facts:
    """One node as it is drawn.

    Attributes:
        name, op: of the node.
        path: of the module whose forward made it, split at the dots.
        kind: the class name of that module.
        tint: "int4", "int8", "float" (a weight that stays so) or "other" (no weight).
        scheme: the line below the name: "int4 g128 sym", or the shape and dtype of a float weight.
        figure, status: the judged dB and its status, from the table; None and "" without.
        tip: several lines for the tooltip.
        text: the node's line of format_graph, and those of its constants.
        reads: the names of the drawn nodes whose values it takes.
    """

    name: str
    op: str
    path: tuple[str, ...]
    kind: str
    tint: str
    scheme: str
    figure: float | None
    status: str
    tip: str
    text: tuple[str, ...]
    reads: tuple[str, ...]


def collect_facts(gm: fx.GraphModule, table: AccuracyTable | None = None) -> list[Facts]:
    """The drawn nodes in execution order. A constant is drawn only where nothing but the output reads it."""
    rows = {row.node: row for row in table.rows} if table is not None else {}
    stored = {a.storage_names[0]: a for _, a in annotated(gm) if a.scheme is not None and a.lowered}
    folded = {n for n in gm.graph.nodes if n.op == "get_attr" and any(user.op != "output" for user in n.users)}
    return [_facts(gm, node, folded, stored, rows.get(node.name)) for node in gm.graph.nodes if node not in folded]


def folded_into(gm: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """Constant -> the drawn nodes that read it, for the constants that are not drawn."""
    readers = {n.name: tuple(u.name for u in n.users if u.op != "output") for n in gm.graph.find_nodes(op="get_attr")}
    return {name: users for name, users in readers.items() if users}


def _facts(
    gm: fx.GraphModule,
    node: fx.Node,
    folded: set[fx.Node],
    stored: Mapping[str, QuantAnnotation],
    row: AccuracyRow | None,
) -> Facts:
    constants = [a for a in node.all_input_nodes if a in folded]
    annotation = next((a for a in map(get_annotation, [node, *constants]) if a is not None), None)
    annotation = annotation or next((stored[str(c.target)] for c in constants if str(c.target) in stored), None)
    tint, scheme = _scheme(gm, node, constants, annotation)
    stack = module_stack(node)
    path = tuple(module_path(node).split("."))[:MAX_DEPTH] if stack and stack[-1][0] else ()
    text = tuple(format_node(gm, n) for n in [node, *constants])
    return Facts(
        name=node.name,
        op=node.op if node.op in ("placeholder", "output", "get_attr") else op_name(node),
        path=path,
        kind=stack[-1][1] if stack else "",
        tint=tint,
        scheme=scheme,
        figure=row.judged_db if row is not None else None,
        status=row.status if row is not None and row.judged_db is not None else "",
        tip=_tip(gm, node, text, annotation, row),
        text=text,
        reads=tuple(a.name for a in node.all_input_nodes if a not in folded),
    )


def _scheme(
    gm: fx.GraphModule, node: fx.Node, constants: list[fx.Node], annotation: QuantAnnotation | None
) -> tuple[str, str]:
    """The colour of a node, and the line about its weight."""
    if annotation is not None and annotation.scheme is not None:
        line = str(annotation.scheme) + ("" if annotation.lowered else ", to come")
        return f"int{annotation.scheme.bits}", line
    tensors = [t for c in constants if (t := get_tensor(gm, c)) is not None]
    if is_ours(node.target):
        name = op_name(node)
        return next((tint for tint in ("int4", "int8") if tint in name), "other"), ""
    if annotation is None and (node.op == "get_attr" or not any(t.dim() > 1 for t in tensors)):
        return "other", ""
    return "float", _tensor(max(tensors, key=lambda t: t.dim())) if tensors else annotation.dtype if annotation else ""


def _tip(
    gm: fx.GraphModule,
    node: fx.Node,
    text: tuple[str, ...],
    annotation: QuantAnnotation | None,
    row: AccuracyRow | None,
) -> str:
    lines = [" ".join(line.split()) for line in text]
    if module_path(node):
        lines.append(f"module: {module_path(node)} ({module_stack(node)[-1][1]})")
    shape = _value(node)
    if shape:
        lines.append(f"value: {shape}")
    if annotation is not None:
        decision = str(annotation.scheme) if annotation.scheme is not None else "float"
        lines.append(f"decision: {decision}" + (f", because {annotation.reason}" if annotation.reason else ""))
        if annotation.activations:
            lines.append(f"activations: {annotation.activations}")
    if row is not None:
        figures = {"weight": row.weight_sqnr_db, "local": row.local_sqnr_db, "accumulated": row.accumulated_sqnr_db}
        said = ", ".join(f"{name} {db(value)} dB" for name, value in figures.items() if value is not None)
        lines.append(f"accuracy: {row.status}" + (f" ({said})" if said else ""))
    return "\n".join(line if len(line) <= 200 else f"{line[:199]}…" for line in lines)


def _value(node: fx.Node) -> str:
    """The shape and dtype of a node's value, where a tracer has left them."""
    for key in ("val", "example_value", "tensor_meta"):
        value: Any = node.meta.get(key)
        if isinstance(value, Tensor) or (hasattr(value, "dtype") and hasattr(value, "shape")):
            return _tensor(value)
    return ""


def _tensor(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
