"""One way through a graph, in order, in which calls that write are made to give values; see functionalize.py."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from mono_quant_fx.errors import CaptureError
from mono_quant_fx.functionalization.current_values import Values
from mono_quant_fx.functionalization.inner_graphs import Result, enter, take
from mono_quant_fx.functionalization.memory import Root, Thing
from mono_quant_fx.functionalization.out_of_place import counterpart, on_copies, value_instead
from mono_quant_fx.functionalization.value_types import needs_cast, value_types
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.calls import augmented, bodies, call_name
from mono_quant_fx.graph.effect_tables import RESHAPERS
from mono_quant_fx.graph.effects import (
    Write,
    is_number,
    is_pieces,
    is_same,
    is_tensor,
    is_view,
    shared,
    writes,
)


class Walk(Values):
    """One way through a graph, in order.

    Args:
        state: placeholders (of a graph inside another) that get the model's own tensors.
        walked: the graphs inside that have been functional before, by id.
    """

    def __init__(
        self, gm: fx.GraphModule, state: frozenset[fx.Node] = frozenset(), walked: dict[int, Walk] | None = None
    ):
        super().__init__(gm.graph)
        self.gm, self.state = gm, state
        self.walked = {} if walked is None else walked
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.types = value_types(gm)
        self.results: dict[fx.Node, dict[int, list[Result]]] = {}  # of calls that run a graph: what each result may be
        self.returned: list[Any] = []
        self.touched: list[fx.Node] = []  # calls that gave a value instead of writing it
        self.given: dict[fx.Node, int] = {}  # a graph inside: written placeholder -> the place of its value

    def run(self) -> Walk:
        """Node by node; the output reads as any other does."""
        states: dict[str, Thing] = {}
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                self.own(node, "state" if node in self.state else "input")
            elif node.op == "get_attr" and node.target in states:
                self.note(node, states[node.target])
            elif node.op == "get_attr":
                if tensors.get_tensor(self.gm, node) is not None:
                    self.own(node, "state")
                    states[node.target] = self.things[node]
            else:
                self._step(node)
        return self

    def written(self) -> list[Root]:
        """The placeholders that were written."""
        roots = dict.fromkeys(self.things[n].root for n in self.things if n.op == "placeholder")
        return [root for root in roots if any(change.thing is not None for change in root.changes)]

    def inside(self, gm: fx.GraphModule, state: frozenset[fx.Node]) -> Walk:
        """The walk through a graph inside this one."""
        if id(gm) not in self.walked:
            self.walked[id(gm)] = Walk(gm, state, self.walked).run()
        return self.walked[id(gm)]

    def _step(self, node: fx.Node) -> None:
        """Reads what the model reads, then writes what it writes."""
        written, inner, sources = writes(node), bodies(node), self._sources(node)
        targets = list(dict.fromkeys(w.node for w in written if w.node in self.things))
        cast = any(needs_cast(node, target, self.types) for target in targets)
        item_of: Any = node.args[0] if node.target is operator.getitem else None
        if node.op == "output":
            self.returned = list(node.args[0]) if isinstance(node.args[0], tuple | list) else [node.args[0]]
        with self.graph.inserting_before(node):
            names = {n: self.now(n) for n in node.all_input_nodes}
        node.args = fx.map_arg(node.args, names.__getitem__)  # type: ignore[assignment]
        node.kwargs = fx.map_arg(node.kwargs, names.__getitem__)  # type: ignore[assignment]
        if node.op == "output":
            return
        if call_name(node) in RESHAPERS:
            self._look_anew(node, sources[0])
        elif inner and not (node.op == "call_module" and targets):
            enter(self, node, inner)
        elif item_of in self.results:
            take(self, node, self.results[item_of])
        elif not targets or not self._write(node, written, targets, names, cast, sources):
            node.target = augmented(node) or node.target  # n += 1 of a number
            self._look(node, sources)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The inputs whose memory a node's value may be; where the export noted both, its tensors tell."""
        found = [n for n in shared(node) if n in self.things]
        value = node.meta.get("val")
        known = [n for n in found if isinstance(n.meta.get("val"), Tensor)]
        if is_same(node) or not isinstance(value, Tensor) or len(known) < len(found):
            return found
        return [n for n in known if _storage(n) == _storage(node)]

    def _look(self, node: fx.Node, sources: list[fx.Node]) -> None:
        """Notes what memory a node's value lies in."""
        if is_number(node):
            return
        if not sources:
            self.own(node)
        elif is_same(node):
            self.note(node, self.things[sources[0]])
        elif node.target is operator.getitem and self.things[sources[0]].is_tuple:
            self._take(node, self.things[sources[0]])
        elif len(sources) == 1 and (is_view(node) or _storage(node) is not None):
            parent, piece = self.things[sources[0]], None
            if node.target is operator.getitem and isinstance(node.args[1], int | str) and not is_tensor(sources[0]):
                piece, parent.is_tuple = node.args[1], True
            changes = len(parent.root.changes)
            self.note(node, Thing(parent.root, node, parent, node, piece, is_pieces(node), changes))
        else:
            self.own(node).link(self.things[source].root for source in sources)

    def _take(self, node: fx.Node, parent: Thing) -> None:
        """An item of a tuple: the same object each time."""
        index = node.args[1]
        piece = index if isinstance(index, int | str) else None
        for other in [self.things[n] for n in parent.root.nodes]:
            if piece is not None and other.parent is parent and other.piece == piece:
                self.note(node, other)
                return
        self.note(node, Thing(parent.root, node, parent, node, piece, piece is None, len(parent.root.changes)))

    def _look_anew(self, node: fx.Node, target: fx.Node) -> None:
        """x.t_(): from now on the object, under all its names, is another view of its memory."""
        thing, name = self.things[target], call_name(node).removesuffix("_")
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = counterpart(node.target)  # type: ignore[assignment]
        else:
            node.op, node.target = "call_method", name
        node._rename(name)
        view = Thing(thing.root, node, thing, node, None, False, len(thing.root.changes))
        for alias, known in list(self.things.items()):
            if known is thing:
                self.note(alias, view, is_current=False)
        self.note(node, view)

    def _write(
        self,
        node: fx.Node,
        written: list[Write],
        targets: list[fx.Node],
        names: dict[fx.Node, fx.Node],
        cast: bool,
        sources: list[fx.Node],
    ) -> bool:
        """Gives the value instead; False where a call that may write is left as it is."""
        is_certain = written[0].is_certain
        kept = [t for t in targets if self.things[t].root.kind == "state"]
        gone = [t for t in targets if t not in kept and (is_certain or self._is_read_later(self.things[t], node))]
        if not is_certain and not gone:
            return False
        if is_certain and any(r.kind == "state" for t in gone for r in self.things[t].root.cluster()):
            raise CaptureError(
                f"{node.name}: it is not certain whether it writes into a tensor of the model or into a copy; give "
                "example_inputs, or write without the underscore (x = x.relu() for x.relu_())"
            )
        values = value_instead(node, [names[t] for t in gone], cast) if is_certain and not kept else None
        values_here = values is not None
        self.touched += [node] if values else []
        if gone and values is None:
            result, values = on_copies(node, [names[t] for t in gone], [names[t] for t in kept])
            self.order[result] = self.order[node]
            node.replace_all_uses_with(result)
            self.graph.erase_node(node)
            node = result
        for target in gone:
            self.change(self.things[target], (values or {})[names[target]], is_certain)
        for target in kept if is_certain else ():
            self.change(self.things[target], None, is_certain)
        given = [t for t in targets if t in sources and is_certain]
        if len(given) == 1:
            thing = self.things[given[0]]
            self.note(node, thing, is_current=given[0] in kept or thing.latest is node or not values_here)
        else:
            self.own(node).link(self.things[t].root for t in targets if not is_certain)
        return True

    def _is_read_later(self, thing: Thing, node: fx.Node) -> bool:
        """Whether the model reads memory of `thing` after `node`."""
        aliases = [n for n in thing.root.nodes if self.things[n].overlaps(thing)]
        return any(self.order.get(user, -1) > self.order[node] for n in aliases for user in n.users)


def _storage(node: fx.Node) -> Any:
    """What an exported node's value lies in; None where it is not known."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
