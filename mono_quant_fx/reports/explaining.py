"""explain: everything that a graph knows about one of its weights, nodes or modules, in words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import fx

from mono_quant_fx.accuracy.row import AccuracyRow, db
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.errors import ConfigError, PreconditionError, UnknownNameError
from mono_quant_fx.graph.annotation import ObservedInput, QuantAnnotation, annotated, stored_weight
from mono_quant_fx.graph.own_names import own_name
from mono_quant_fx.graph.provenance import Step, history
from mono_quant_fx.graph.tensors import get_tensor, module_path, module_stack, op_name
from mono_quant_fx.reports.code_summary import CodeSummary, summarize
from mono_quant_fx.reports.explanation import Chapter, Explanation
from mono_quant_fx.storage.result import QuantizationResult

Fact = tuple[str, str]
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')
_NOT_THE_USERS = tuple(map(str, (Path(str(torch.__file__)).parent, Path(__file__).parents[1])))


def explain(source: fx.GraphModule | QuantizationResult, name: str, table: AccuracyTable | None = None) -> Explanation:
    """Tells what was done to a weight or a node, by whom and why, and what it cost.

    Args:
        source: a graph that passes made, or what quantize returned, whose table is taken when none is given.
        name: of a weight ("fc.weight"), a module ("fc" or "layers.0": all weights in it), a node ("linear_1"), or a
            tensor of the graph ("fc.weight_scale").
        table: measured on this graph; without one, no figure of accuracy is told.

    Raises:
        UnknownNameError: the graph has nothing of that name; lists the nearest names.
        PreconditionError: `source` is neither of the two. ConfigError: `table` is no AccuracyTable.

    >>> import mono_quant_fx as mq
    >>> from torch import nn
    >>> result = mq.quantize(nn.Sequential(nn.Linear(64, 32)).eval(), group_size=32)
    >>> (chapter,) = mq.explain(result, "0").chapters
    >>> chapter.title, dict(chapter.facts)["decision"], chapter.codes.used
    ('0.weight', 'int4 g32 sym', 16)
    """
    if isinstance(source, QuantizationResult):
        table = source.accuracy if table is None else table
        source = source.graph_module
    if not isinstance(source, fx.GraphModule):
        raise PreconditionError(
            f"explain: a GraphModule or a QuantizationResult is needed, not {type(source).__name__}; give what "
            "mq.quantize or a pass returned"
        )
    if table is not None and not isinstance(table, AccuracyTable):
        raise ConfigError(f"explain: table={table!r}: what mq.measure_accuracy returns is needed, or None")
    return Explanation(name, tuple(_Book(source, table).chapters(name)))


class _Book:
    """All that can be told of one graph."""

    def __init__(self, gm: fx.GraphModule, table: AccuracyTable | None):
        self.gm, self.rows = gm, () if table is None else table.rows
        self.measured_on = None if table is None else table.measured_on
        self.nodes = {node.name: node for node in gm.graph.nodes}
        self.weights = list(annotated(gm))
        self.paths = {node: {path for path, _ in module_stack(node)} for node in gm.graph.nodes}

    def chapters(self, name: str) -> Iterator[Chapter]:
        """Those of a module's weights, or of what else has the name.

        Raises:
            UnknownNameError: nothing has.
        """
        if not isinstance(name, str) or not name:
            raise UnknownNameError(self._unknown(name))
        told = [pair for pair in self.weights if self._is_about(*pair, name)]
        nodes = [
            node for node in self.gm.graph.nodes if node.name == name or name in (_target(node), *self.paths[node])
        ]
        if not told and not nodes:
            raise UnknownNameError(self._unknown(name))
        if told:
            yield from (self._weight(*pair) for pair in told)
        else:
            exact = [node for node in nodes if name not in self.paths[node]]
            yield from map(self._node, exact or nodes)

    def _is_about(self, node: fx.Node, annotation: QuantAnnotation, name: str) -> bool:
        weights = (annotation.weight, own_name(self.gm, annotation.weight))
        if name in (node.name, *weights, *_stored_names(annotation)):
            return True
        users = annotation.users
        owners = (*(weight.rpartition(".")[0] for weight in weights), *(user.module for user in users))
        return any(owner == name or owner.startswith(f"{name}.") for owner in owners if name) or name in [
            user.node for user in users
        ]

    def _unknown(self, name: object) -> str:
        known = {
            *self.nodes,
            *(own_name(self.gm, a.weight) for _, a in self.weights),
            *(p for paths in self.paths.values() for p in paths),
        }
        known |= {target for node in self.gm.graph.nodes if (target := _target(node))}
        near = difflib.get_close_matches(str(name), sorted(known - {""}), 5, 0.5)
        listed = "the nearest names are " + ", ".join(near) if near else "mq.format_graph(gm) lists its nodes"
        return f"explain: the graph has no node, module or weight {name!r}; {listed}"

    def _weight(self, node: fx.Node, annotation: QuantAnnotation) -> Chapter:
        users = [self.nodes[user.node] for user in annotation.users if user.node in self.nodes]
        codes = summarize(self.gm, annotation) if annotation.lowered else None
        own = own_name(self.gm, annotation.weight)
        facts = [
            *(("op", f"{user.op} {user.node}{_in(user.module)}") for user in annotation.users),
            *_where(users or [node]),
            ("weight", f"{annotation.dtype} {list(annotation.shape)}"),
            ("decision", _decision(annotation)),
            *(("input", _seen(seen)) for seen in annotation.observed),
            *_rounding(annotation),
            *self._storage(annotation),
            *_figures(codes),
            *_computed(annotation, users),
            *(f for row in self.rows if row.weight == own for f in _accuracy(row, self.measured_on)),
        ]
        before = () if annotation.merged is None else self._before_merging(annotation)
        steps = dict.fromkeys((*before, *(step for n in (node, *users) for step in history(n))))
        return Chapter(own, tuple(facts), tuple(steps), codes)

    def _before_merging(self, annotation: QuantAnnotation) -> Iterator[Step]:
        """The steps of a weight that is now some rows of a larger one, picked out of the history of that one."""
        own = f"get_attr {replace(annotation, merged=None).storage_names[0]}"
        whole = next(node for node in self.gm.graph.nodes if _target(node) == annotation.storage_names[0])
        names = {step.node for step in history(whole) if step.action == "created" and step.after == own}
        told = []
        for step in reversed(history(whole)):
            if step.node in names:
                names.update(step.sources)
                told.append(step)
        return reversed(told)

    def _node(self, node: fx.Node) -> Chapter:
        value = get_tensor(self.gm, node)
        kind = f"get_attr {node.target}" if node.op == "get_attr" else op_name(node)
        kind = node.op if node.op in ("placeholder", "output") else kind
        reads, readers = (", ".join(n.name for n in nodes) for nodes in (node.all_input_nodes, node.users))
        facts = [
            ("op", kind + _in(module_path(node))),
            *_where([node]),
            *([("value", _tensor(value))] if value is not None else []),
            *([("reads", reads)] if reads else []),
            *([("read by", readers)] if readers else []),
            *(f for row in self.rows if row.node == node.name for f in _accuracy(row, self.measured_on)),
        ]
        steps: tuple[Step, ...] = history(node)
        if not steps:
            facts.append(("passes", "none changed it: it is as it was captured"))
        return Chapter(node.name, tuple(facts), steps)

    def _storage(self, annotation: QuantAnnotation) -> list[Fact]:
        if not annotation.lowered:
            return []
        tensors = zip(annotation.storage_names, stored_weight(self.gm, annotation), strict=True)
        stored = ", ".join(f"{name} {_tensor(t)}" for name, t in tensors if t is not None)
        rows = annotation.merged
        return [("stored", stored if rows is None else f"rows {rows.start} to {rows.stop - 1} of {stored}")]


def _target(node: fx.Node) -> str:
    return str(node.target) if node.op in ("get_attr", "call_module") else ""


def _stored_names(annotation: QuantAnnotation) -> tuple[str, ...]:
    return annotation.storage_names if annotation.lowered else ()


def _in(module: str) -> str:
    return f" of module {module}" if module else ""


def _tensor(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _where(nodes: list[fx.Node]) -> list[Fact]:
    """The user's line behind each node, innermost call; nothing where capture left none."""
    places: dict[str, None] = {}
    for node in nodes:
        frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if not f[0].startswith(_NOT_THE_USERS)]
        if frames:
            file, line, text = frames[-1]
            places[f"{file}:{line}: {text.strip()}"] = None
    return [("line", place) for place in places]


def _decision(annotation: QuantAnnotation) -> str:
    decision = str(annotation.scheme) if annotation.scheme else f"stays {annotation.dtype}"
    planned = ", planned and not carried out yet" if annotation.scheme and not annotation.lowered else ""
    return decision + planned + (f": {annotation.reason}" if annotation.reason else "")


def _seen(seen: ObservedInput) -> str:
    figures = ", ".join(f"{name} {_span(values)}" for name, values in seen.statistics.items() if values)
    text = f"{seen.source}, watched by {seen.observer}" + (f" ({seen.reason})" if seen.reason else "")
    if seen.scale is not None:
        figures += f"; INT8 with scale {seen.scale:.4g} and zero point {seen.zero_point}"
    return f"{text}: {figures}"


def _span(values: tuple[float, ...]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if len(values) == 1 else f"{low:.4g} .. {high:.4g} ({len(values)} values)"


def _rounding(annotation: QuantAnnotation) -> list[Fact]:
    gains = [
        ("gains {} dB over rounding to nearest", annotation.gain_db),
        ("INT8 would gain {} dB more", annotation.int8_gain_db),
        ("the corrected bias gains {} dB", annotation.bias_gain_db),
    ]
    told = [words.format(db(gain)) for words, gain in gains if gain is not None]
    return [("rounding", "; ".join([annotation.algorithm or "rtn", *told]))] if annotation.lowered or told else []


def _figures(codes: CodeSummary | None) -> list[Fact]:
    if codes is None:
        return []
    low, median, high = codes.scales
    share = 100 * codes.saturated / max(1, codes.weights)
    scales = f"{codes.rows} x {codes.groups}: min {low:.4g}, median {median:.4g}, max {high:.4g}"
    zeros = "none: symmetric" if codes.zero_points is None else "{} .. {}".format(*codes.zero_points)
    ends = " or ".join(map(str, codes.code_range))
    used = f"{codes.used} of {len(codes.counts)} used; {share:.2g}% of the weights saturate (code {ends})"
    return [("scales", scales), ("zero points", zeros), ("codes", used)]


def _computed(annotation: QuantAnnotation, users: list[fx.Node]) -> list[Fact]:
    """The op that runs now, where it is another, or where it computes several layers."""
    if annotation.merged is not None:
        whole = users[0].all_input_nodes[0].all_input_nodes[0]
        pieces = [node.name for node in users[0].all_input_nodes[0].users]
        return [("runs as", f"{op_name(whole)} {whole.name}, one product for {', '.join(pieces)}")]
    told = {node.name: op_name(node) for node in users}
    changed = [told[user.node] for user in annotation.users if told.get(user.node, user.op) != user.op]
    if changed:
        return [("runs as", ", ".join(dict.fromkeys(changed)))]
    return [("runs as", f"{', '.join(told.values())} on the dequantized weight")] if annotation.lowered else []


def _accuracy(row: AccuracyRow, measured_on: str | None) -> list[Fact]:
    figures = [
        ("weight", row.weight_sqnr_db), ("alone", row.local_sqnr_db), ("with all before it", row.accumulated_sqnr_db),
    ]  # fmt: skip
    told = [f"{words} {db(figure)} dB" for words, figure in figures if figure is not None]
    if row.max_abs_error is not None:
        told.append(f"largest error {row.max_abs_error:.2g}")
    on = f", on {measured_on}" if measured_on and row.accumulated_sqnr_db is not None else ""
    return [("accuracy", f"{row.node}: {', '.join(told)}{on}; {row.status}")] if told else []
