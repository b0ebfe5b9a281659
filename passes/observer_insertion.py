"""observer-insertion: where to measure. After it, what feeds an annotated op runs through an observer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from mono_quant_fx import graph
from mono_quant_fx.annotation import annotated, pending, plain_inputs
from mono_quant_fx.observers import Observer, create_observer
from mono_quant_fx.pass_base import Pass

PREFIX = "observer_of_"


@dataclass(frozen=True)
class ObserverInsertion(Pass):
    """One observer (forward = identity) on each input of an op whose weight has a scheme; shared inputs once.

    Args:
        observer: a name that create_observer knows; it decides which range INT8 activations get.
        options: of that observer, as (name, value) pairs.
    """

    observer: str = "minmax"
    options: tuple[tuple[str, Any], ...] = ()
    name: ClassVar[str] = "observer-insertion"

    def requires(self, gm: fx.GraphModule) -> str | None:
        """Decisions are on the graph."""
        return None if any(annotated(gm)) else "no weight is annotated; run skip-annotation first"

    def rewrite(self, gm: fx.GraphModule) -> None:
        """One call_module a distinct input; integer inputs (of embeddings) are no activations."""
        nodes = {n.name: n for n in gm.graph.nodes}
        for source, users in _inputs(gm, nodes).items():
            target = PREFIX + source.name
            graph.attach(gm, target, create_observer(self.observer, **dict(self.options)))
            with gm.graph.inserting_after(source):
                observed = gm.graph.call_module(target, (source,))
            observed.meta = {k: v for k, v in source.meta.items() if k != "mono_quant_fx"}
            for user in users:
                user.replace_input_with(source, observed)

    def ensures(self, gm: fx.GraphModule) -> str | None:
        """Every such input is observed."""
        left = _inputs(gm, {n.name: n for n in gm.graph.nodes})
        return f"{next(iter(left)).name} is not observed" if left else None


def is_observer(node: fx.Node) -> bool:
    """Whether a node calls an observer."""
    if node.op != "call_module":
        return False
    return isinstance(graph.get_attribute(node.graph.owning_module, str(node.target)), Observer)  # type: ignore[arg-type]


def _inputs(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Each activation that is still to be observed, with the annotated ops that read it."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for _, annotation in pending(gm):
        if not annotation.observed:
            for source, user in plain_inputs(annotation, nodes):
                users = found.setdefault(source, [])
                if user not in users:
                    users.append(user)
    return found
