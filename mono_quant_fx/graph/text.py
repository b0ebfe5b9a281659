"""Graphs as text: one line a node, and the difference of two graphs."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, fx

from mono_quant_fx.graph.annotation import get_annotation
from mono_quant_fx.graph.tensors import get_attribute, need_graph, op_name


def format_graph(gm: fx.GraphModule) -> str:
    """One line a node: name, operation, arguments, and on the right the tensor and decision behind a constant.

    >>> import mono_quant_fx as mq
    >>> from torch import nn
    >>> print(format_graph(mq.capture(nn.Linear(4, 2).eval())))
    %input_1 = placeholder
    %weight = get_attr weight                              # float32[2, 4]
    %bias = get_attr bias                                  # float32[2]
    %linear = linear(%input_1, %weight, %bias)
    return %linear
    """
    return "\n".join(format_node(gm, node) for node in need_graph(gm, "format_graph").graph.nodes)


def diff_graphs(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """A unified diff of the two graphs' lines; empty when they read the same."""
    lines = difflib.unified_diff(
        format_graph(before).splitlines(),
        format_graph(after).splitlines(),
        "before",
        "after",
        n=1,
        lineterm="",
    )
    return "\n".join(lines)


def format_node(gm: fx.GraphModule, node: fx.Node) -> str:
    """The line of one node in format_graph."""
    if node.op == "output":
        return f"return {_show(node.args[0])}"
    if node.op == "placeholder":
        return f"%{node.name} = placeholder"
    note = _note(gm, node)
    if node.op == "get_attr":
        text = f"%{node.name} = get_attr {node.target}"
    else:
        named = [f"{k}={_show(v)}" for k, v in node.kwargs.items() if v is not None]
        where = f"[{node.target}]" if node.op == "call_module" else ""
        text = f"%{node.name} = {op_name(node)}{where}({', '.join([*map(_show, node.args), *named])})"
    return f"{text:<54} # {note}" if note else text


def _note(gm: fx.GraphModule, node: fx.Node) -> str:
    value = get_attribute(gm, str(node.target)) if node.op == "get_attr" else None
    notes = [f"{str(value.dtype)[6:]}{list(value.shape)}"] if isinstance(value, Tensor) else []
    annotation = get_annotation(node)
    if annotation is not None:
        decision = str(annotation.scheme) if annotation.scheme else "float"
        notes.append(f"{decision}: {annotation.reason}" if annotation.reason else decision)
    return "  ".join(notes)


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple | list):
        inner = ", ".join(map(_show, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_show(v)}" for k, v in value.items()) + "}"
    return repr(value)
