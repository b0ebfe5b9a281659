"""Where a node comes from: each pass notes what it made from which nodes, and what it changed, in node.meta.

The base class of the passes calls mark() before a rewrite and record() after it, so that no pass writes its own notes.
In between every node carries its own name as a mark. A new node takes over the meta of the node that it stands for, and
with it the mark; one without a mark stands for the nearest nodes of the old graph that it reads, or that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from torch import fx

from mono_quant_fx.errors import PreconditionError
from mono_quant_fx.graph.annotation import KEY as DECISION
from mono_quant_fx.graph.annotation import QuantAnnotation, get_annotation
from mono_quant_fx.graph.fingerprint import Fingerprint, NodeToken
from mono_quant_fx.graph.tensors import HISTORY, op_name

_MARK = "mono_quant_fx_mark"
_LONGEST = 160


@dataclass(frozen=True)
class Step:
    """What one pass did to one node.

    Attributes:
        pass_name: the pass.
        action: "created" or "changed".
        node: the node's name after that pass.
        sources: created: names of the nodes, in the graph before, that it was made from. Changed: the one node's own.
        what: changed: its "op", "inputs", "decision" (the annotation), "value" (of the constant) or "meta".
        before, after: the call, the inputs, the decision or the tensor as text; of a new node, only after.
    """

    pass_name: str
    action: str
    node: str
    sources: tuple[str, ...]
    what: str = ""
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        if self.action == "created":
            return f"{self.pass_name} made {self.node} from {', '.join(self.sources) or 'nothing'}: {self.after}"
        arrow = f"{self.before} -> {self.after}" if self.before else self.after
        return f"{self.pass_name} changed the {self.what} of {self.node}: {arrow}"


def history(node: fx.Node) -> tuple[Step, ...]:
    """What passes did to a node, oldest first, beginning with what they did to the nodes that it was made from.

    Empty for a node that is as it was captured. Steps are plain data; they stay through clones and later passes.

    >>> import mono_quant_fx as mq
    >>> from torch import nn
    >>> gm = mq.quantize(nn.Sequential(nn.Linear(64, 32)).eval(), group_size=32).graph_module
    >>> (linear,) = gm.graph.find_nodes(op="call_function", target=mq.ops.int4_linear)
    >>> [(step.pass_name, step.what) for step in history(linear)]
    [('int4-lowering', 'inputs'), ('dequant-fusion', 'op')]

    Raises:
        PreconditionError: no node is given.
    """
    if not isinstance(node, fx.Node):
        raise PreconditionError(
            f"history: a node of a graph is needed, not {type(node).__name__}; those of a result are "
            "result.graph_module.graph.nodes, and mq.explain(result, name) tells a weight's whole story"
        )
    return node.meta.get(HISTORY, ())


def mark(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """Puts its name on every node, for whoever copies the meta; returns the names."""
    names = {node: node.name for node in gm.graph.nodes}
    for node, name in names.items():
        node.meta[_MARK] = (name,)
    return names


def stand_for(node: fx.Node, sources: Iterable[fx.Node]) -> None:
    """Says that a new node stands for several nodes."""
    names = [name for source in sources for name in source.meta.get(_MARK, ())]
    if names:
        node.meta[_MARK] = tuple(dict.fromkeys(names))


def unmark(gm: fx.GraphModule) -> dict[fx.Node, tuple[str, ...]]:
    """Takes the marks off again and returns them."""
    return {node: node.meta.pop(_MARK, ()) for node in gm.graph.nodes}


@dataclass(frozen=True)
class Marks:
    """What was known of the nodes: by whom they were named before the rewrite, and the marks found after it."""

    names: dict[fx.Node, str]
    found: dict[fx.Node, tuple[str, ...]]

    def origin(self, node: fx.Node) -> tuple[str, ...]:
        """Names of the old nodes that a new one stands for."""
        inputs, readers = attrgetter("all_input_nodes"), attrgetter("users")
        return self.found.get(node) or self._nearest(node, inputs) or self._nearest(node, readers)

    def _nearest(self, node: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> tuple[str, ...]:
        todo, seen = list(step(node)), {node}
        names: dict[str, None] = {}
        for near in todo:  # which grows on the way
            if near in seen:
                continue
            seen.add(near)
            marks = (self.names[near],) if near in self.names else self.found.get(near, ())
            names.update(dict.fromkeys(marks))
            if not marks:
                todo.extend(step(near))
        return tuple(names)


def record(
    pass_name: str,
    source: fx.GraphModule,
    result: fx.GraphModule,
    marks: Marks,
    before: Fingerprint,
    after: Fingerprint,
) -> None:
    """Adds to the history of each node of `result` what the pass did to it.

    Args:
        marks: of the nodes of `result`.
        before, after: fingerprints of `source` and of `result`; only where they differ is a node looked at.
    """
    old = {node.name: (node, token) for node, token in zip(source.graph.nodes, before.nodes, strict=True)}
    stored = [{name: tensor.place for name, tensor, _ in found.tensors} for found in (before, after)]
    for node, token in zip(list(result.graph.nodes), after.nodes, strict=True):
        name = marks.names.get(node)
        if name is None:
            inherited = [step for origin in marks.found.get(node, ()) for step in history(old[origin][0])]
            created = Step(pass_name, "created", node.name, marks.origin(node), after=_call(node))
            node.meta[HISTORY] = tuple(dict.fromkeys([*inherited, created]))
            continue
        twin, was = old[name]
        steps = list(_changes(pass_name, twin, node, was, token)) if token != was else []
        if node.op == "get_attr" and _moved(stored[0].get(str(twin.target)), stored[1].get(str(node.target))):
            steps.append(Step(pass_name, "changed", node.name, (name,), "value", "", str(node.target)))
        _add(node, steps)


def _add(node: fx.Node, steps: Sequence[Step]) -> None:
    if steps:
        node.meta[HISTORY] = (*history(node), *steps)


def _moved(old: Any, new: Any) -> bool:
    """Whether a constant has other memory, dtype or shape."""
    return old is not None and new is not None and old != new


def _changes(pass_name: str, old: fx.Node, new: fx.Node, was: NodeToken, now: NodeToken) -> Iterable[Step]:
    def changed(what: str, before: str, after: str) -> Step:
        return Step(pass_name, "changed", new.name, (old.name,), what, before, after)

    if (was.op, was.target) != (now.op, now.target):
        yield changed("op", _call(old), _call(new))
    elif (was.args, was.kwargs) != (now.args, now.kwargs):
        yield changed("inputs", *_inputs(old, new))
    keys = {key for key, _ in set(now.meta) - set(was.meta)} | ({"type"} if was.type != now.type else set())
    decisions = get_annotation(old), get_annotation(new)
    if decisions[0] != decisions[1]:
        yield changed("decision", *_decisions(*decisions))
    elif DECISION in keys:
        yield changed("decision", "", "its codes")
    if keys - {DECISION}:
        yield changed("meta", "", ", ".join(sorted(str(key) for key in keys - {DECISION})))


def _call(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return f"{node.op} {node.target}"
    arguments = [*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]
    return _short(f"{op_name(node)}({', '.join(arguments)})")


def _inputs(old: fx.Node, new: fx.Node) -> tuple[str, str]:
    """What it reads no longer, and reads now; all arguments where only their order or a number changed."""
    before, after = (dict.fromkeys(a.name for a in node.all_input_nodes) for node in (old, new))
    gone, come = [a for a in before if a not in after], [a for a in after if a not in before]
    if gone or come:
        return _short(", ".join(gone)), _short(", ".join(come))
    return _call(old), _call(new)


def _decisions(old: QuantAnnotation | None, new: QuantAnnotation | None) -> tuple[str, str]:
    if new is None:
        return _decision(old), "none"
    if old is None or old.scheme != new.scheme:
        return _decision(old), _decision(new)
    differ = [f.name for f in fields(new) if f.compare and getattr(old, f.name) != getattr(new, f.name)]
    return "", _short(", ".join(_field(name, getattr(new, name)) for name in differ))


def _decision(annotation: QuantAnnotation | None) -> str:
    if annotation is None:
        return ""
    decision = str(annotation.scheme) if annotation.scheme else "float"
    return f"{decision} ({annotation.reason})" if annotation.reason else decision


def _field(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{name} {value:.4g}"
    if name == "observed":
        return f"observed {', '.join(seen.source for seen in value)}"
    return f"{name} {value}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
