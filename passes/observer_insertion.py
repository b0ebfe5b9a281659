"""observer-insertion: where to measure. After it, what feeds an annotated op runs through an observer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from mono_quant_fx.calibration.observers import Observer, create_observer
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import annotated, pending, plain_inputs
from mono_quant_fx.graph.arguments import Arg, set_argument
from mono_quant_fx.graph.free_names import free_name
from mono_quant_fx.graph.weight_table import consumption
from mono_quant_fx.pass_base import Pass

PREFIX = "observer_of_"


@dataclass(frozen=True)
class ObserverInsertion(Pass):
    """One observer (forward = identity) on each input of an op whose weight has a scheme; shared inputs once.

    An observer of channels looks along the axis that the weight sums over, and so twice where two weights differ in it.

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
        for (source, axis), users in _inputs(gm, self._default_axis()).items():
            options = dict(self.options) if axis is None else {**dict(self.options), "axis": axis}
            target = free_name(gm, PREFIX + source.name)
            tensors.attach(gm, target, create_observer(self.observer, **options))
            with gm.graph.inserting_after(source):
                observed = gm.graph.call_module(target, (source,))
            observed.meta = {k: v for k, v in source.meta.items() if k != "mono_quant_fx"}
            for user, at in users:
                set_argument(user, at, observed)

    def ensures(self, gm: fx.GraphModule) -> str | None:
        """Every such input is observed."""
        left = _inputs(gm, None)
        return f"{next(iter(left))[0].name} is not observed" if left else None

    def _default_axis(self) -> int | None:
        """The axis of an observer that looks along one, where the options leave it open; None where they do not."""
        return None if "axis" in dict(self.options) else create_observer(self.observer, **dict(self.options)).axis


def is_observer(node: fx.Node) -> bool:
    """Whether a node calls an observer."""
    if node.op != "call_module":
        return False
    return isinstance(tensors.get_attribute(node.graph.owning_module, str(node.target)), Observer)  # type: ignore[arg-type]


def _inputs(
    gm: fx.GraphModule, default_axis: int | None
) -> dict[tuple[fx.Node, int | None], list[tuple[fx.Node, Arg]]]:
    """Each activation that is still to be observed and the axis to look along, with the ops that read it, and where.

    An observer of an axis (its default is `default_axis`; None: there is none) looks along the one that the weight sums
    over: the last for a linear, the channels for a convolution.
    """
    found: dict[tuple[fx.Node, int | None], list[tuple[fx.Node, Arg]]] = {}
    nodes = {n.name: n for n in gm.graph.nodes}
    for node, annotation in pending(gm):
        if annotation.observed:
            continue
        for source, user, at in plain_inputs(node, annotation, nodes):
            row = consumption(user, node)
            summed = None if row is None else row.contracts(len(annotation.shape))
            axis = None if default_axis is None else summed or default_axis
            found.setdefault((source, axis), []).append((user, at))
    return found
