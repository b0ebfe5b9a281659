"""What the model's tensors are by now: the node of each value after the writes so far, made where there is none."""

from __future__ import annotations

import torch
from torch import fx

from mono_quant_fx.errors import CaptureError
from mono_quant_fx.functionalization.memory import Change, Root, Thing, pieces
from mono_quant_fx.functionalization.views import again, put_back, put_back_piece
from mono_quant_fx.graph.calls import first_argument
from mono_quant_fx.graph.effects import is_pieces


class Values:
    """The things that the nodes of a graph stand for.

    Attributes:
        things: node -> the tensor of the model that it gives; nothing for numbers.
        made: node -> how many changes its memory had seen when it gave its value; -1 where it never gave it.
        copies: nodes that were added to look at a changed tensor again.
    """

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.things: dict[fx.Node, Thing] = {}
        self.made: dict[fx.Node, int] = {}
        self.copies: list[fx.Node] = []

    def own(self, node: fx.Node, kind: str = "value") -> Root:
        """`node` gives a tensor with memory of its own."""
        root = Root(node, kind)
        self.note(node, Thing(root, node, is_tuple=isinstance(node.meta.get("val"), tuple | list)))
        return root

    def note(self, node: fx.Node, thing: Thing, is_current: bool = True) -> None:
        """`node` stands for `thing`; is_current: it has its value by now."""
        self.things[node] = thing
        self.made[node] = len(thing.root.changes) if is_current else -1
        thing.root.nodes.append(node)
        if is_current:
            thing.latest, thing.seen = node, len(thing.root.changes)

    def change(self, thing: Thing, value: fx.Node | None, is_certain: bool = True) -> None:
        """`thing` was written, and is `value` now (None: in place)."""
        thing.root.changes.append(Change(thing, value))
        if value is not None:
            thing.latest, thing.seen = value, len(thing.root.changes)
        for other in thing.root.cluster() if is_certain else ():
            other.changes.append(Change(None))

    def now(self, node: fx.Node) -> fx.Node:
        """The node that has, at the insertion point, what `node` stands for in the model."""
        thing = self.things.get(node)
        if thing is None:
            return node
        since = thing.root.changes[max(self.made[node], 0) :]
        if any(change.thing is None for change in since):
            raise CaptureError(
                f"{node.name}: it is not certain whether a write changed it, as a call between (reshape, say) gives "
                "a view or a copy, depending on its input; give example_inputs, or write without the underscore "
                "(x = x.relu() for x.relu_())"
            )
        if self.made[node] >= 0 and not any(c.thing is not None and thing.overlaps(c.thing) for c in since):
            return node
        return self.latest(thing)

    def latest(self, thing: Thing) -> fx.Node:
        """The node of its value by now, made where there is none."""
        changes = [c for c in thing.root.changes[thing.seen :] if c.thing is not None and thing.overlaps(c.thing)]
        if changes:
            if thing.parent is not None:
                thing.latest = self._again(thing, self.latest(thing.parent))
            elif thing.root.kind == "state":
                thing.latest = self.graph.call_function(torch.ops.aten.alias.default, (thing.root.node,))
                thing.latest.meta = dict(thing.root.node.meta)
            else:
                for change in changes:
                    thing.latest = self._after(change, thing.latest)
        thing.seen = len(thing.root.changes)
        return thing.latest

    def _again(self, thing: Thing, parent: fx.Node) -> fx.Node:
        step = thing.step
        assert step is not None and thing.parent is not None
        first = first_argument(step)
        new = again(step, lambda n: parent if n is first else self.now(n))
        self.copies.append(new)
        return new

    def _after(self, change: Change, whole: fx.Node) -> fx.Node:
        """The value of a root's own tensor after a change."""
        assert change.thing is not None and change.value is not None
        path = change.thing.path()
        before = {path[0]: whole}
        for thing in path[1:]:
            if thing is not change.thing:
                assert thing.parent is not None
                before[thing] = self._again(thing, before[thing.parent])
        value = change.value
        for thing, parts in pieces(path):
            assert thing.parent is not None and thing.step is not None
            if parts is None:
                value = put_back(thing.step, before[thing.parent], value)
            else:
                value = self._put_back_piece(thing, parts, before[parts], value)
            value.meta = {k: v for k, v in change.value.meta.items() if k != "val"}
        return value

    def _put_back_piece(self, thing: Thing, parts: Thing, before: fx.Node, value: fx.Node) -> fx.Node:
        if parts.step is None or not is_pieces(parts.step) or not isinstance(thing.piece, int):
            raise CaptureError(
                f"{parts.latest.name}: a part of it, {thing.latest.name}, is written, and it is read again, and may be "
                "a tuple as well as a tensor; give example_inputs, or write without the underscore"
            )
        return put_back_piece(before, thing.piece, value)
