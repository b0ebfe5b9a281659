"""The graphs inside a call (torch.cond, an autocast block), made functional: they give what they wrote into inputs."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import fx

from mono_quant_fx.errors import CaptureError
from mono_quant_fx.functionalization.memory import Thing

if TYPE_CHECKING:
    from mono_quant_fx.functionalization.write_walk import Walk


class Result(NamedTuple):
    """What a call's result is, or may be (is_same is False), after so many changes of its memory."""

    thing: Thing
    is_same: bool
    changes: int


def enter(walk: Walk, node: fx.Node, inner: list[tuple[fx.GraphModule, list[Any]]]) -> None:
    """Makes the graphs that `node` runs functional, and notes what it writes and what its results are.

    Args:
        inner: (graph, what its placeholders get, as the model names it).

    Raises:
        CaptureError: one of several branches writes into what comes from outside.
    """
    found: dict[int, list[tuple[Thing, bool]]] = {}
    for body, operands in inner:
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        pairs = zip(placeholders, operands, strict=False)
        outside = {p: walk.things[o] for p, o in pairs if isinstance(o, fx.Node) and o in walk.things}
        state = frozenset(p for p, thing in outside.items() if thing.root.kind == "state")
        own = walk.inside(body, state)
        written = [root for root in own.written() if root.node in outside]
        given = [root.node for root in written if root.kind == "input"]
        if given and len(inner) > 1:
            raise CaptureError(
                f"{node.name}: a branch writes into {given[0].name}, which comes from outside; write without the "
                "underscore (x = x.relu() for x.relu_()) and return it"
            )
        places = _give(own, given)
        for root in written:
            value = None
            if root.node in places:
                with node.graph.inserting_after(node):
                    value = node.graph.call_function(operator.getitem, (node, places[root.node]))
            walk.change(outside[root.node], value)
        for at, returned in enumerate(own.returned):
            found.setdefault(at, []).extend(_origins(own, returned, outside))
    walk.own(node)
    walk.things[node].is_tuple = True
    walk.results[node] = {at: [Result(t, same, len(t.root.changes)) for t, same in kin] for at, kin in found.items()}


def take(walk: Walk, node: fx.Node, results: dict[int, list[Result]]) -> None:
    """`node` is one of the results of such a call."""
    kin = results.get(node.args[1], [])  # type: ignore[arg-type]
    if len(kin) == 1 and kin[0].is_same:
        walk.things[node], walk.made[node] = kin[0].thing, kin[0].changes
        kin[0].thing.root.nodes.append(node)
    else:
        walk.own(node).link(result.thing.root for result in kin)


def _give(own: Walk, placeholders: list[fx.Node]) -> dict[fx.Node, int]:
    """Adds the values of written inputs to a graph's results; placeholder -> the place of its value."""
    if not placeholders:
        return {}
    output = next(n for n in own.graph.nodes if n.op == "output")
    results = list(output.args[0]) if isinstance(output.args[0], tuple | list) else [output.args[0]]
    places = {}
    for placeholder in placeholders:
        if placeholder not in own.given:
            with own.graph.inserting_before(output):
                own.given[placeholder] = len(results)
                results.append(own.latest(own.things[placeholder]))
        places[placeholder] = own.given[placeholder]
    output.args = (tuple(results),)
    own.gm.recompile()
    return places


def _origins(own: Walk, returned: Any, outside: dict[fx.Node, Thing]) -> list[tuple[Thing, bool]]:
    """The things outside that a result is, or may share memory with."""
    thing = own.things.get(returned)
    if thing is None:
        return []
    is_same = thing.parent is None and thing.root.node in outside
    roots = {thing.root, *thing.root.cluster()}
    return [(outside[root.node], is_same) for root in roots if root.node in outside]
