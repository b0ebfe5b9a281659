"""calibration: runs the observed graph on the data. After it annotations hold what was seen; observers are gone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import fx

from mono_quant_fx import graph
from mono_quant_fx.annotation import ObservedInput, annotated, pending, set_annotation
from mono_quant_fx.data import Prepare, collect
from mono_quant_fx.observers import Observer
from mono_quant_fx.pass_base import Pass
from mono_quant_fx.run import Progress, run_batch


@dataclass(frozen=True)
class CalibrationExecution(Pass):
    """Feeds the first `num_calibration_samples` of `batches` through the graph, without gradients.

    Raises:
        CalibrationError: no data, a batch that does not fit, or an op that fails; names the node and the batch.
    """

    batches: Iterable[Any] = field(repr=False)
    num_calibration_samples: int = 150
    prepare_batch: Prepare | None = field(default=None, repr=False)
    name: ClassVar[str] = "calibration"

    def requires(self, gm: fx.GraphModule) -> str | None:
        """There is something to run: observers, or statistics from an earlier run."""
        if not any(annotated(gm)):
            return "no weight is annotated; run skip-annotation and observer-insertion first"
        if any(a.observed or a.lowered for _, a in annotated(gm)) or _observers(gm):
            return None
        return "the graph has no observers; run observer-insertion first"

    def rewrite(self, gm: fx.GraphModule) -> None:
        """Runs, moves the statistics to the annotations, and takes the observers out."""
        calls = _observers(gm)
        if not calls:
            return
        batches, samples = collect(self.batches, self.num_calibration_samples, self.prepare_batch)
        twin = graph.isolate(gm)
        assert isinstance(twin, fx.GraphModule)
        for call in calls:
            graph.get_attribute(twin, str(call.target)).reset()
        with Progress("calibrating", samples) as progress:
            for number, batch in enumerate(batches):
                run_batch(twin, batch, number)
                progress.advance(batch.samples())
        for node, annotation in list(pending(gm)):
            inputs = {use.input for use in annotation.users}
            seen = [_observed(twin, call) for call in calls if call.all_input_nodes[0].name in inputs]
            set_annotation(node, replace(annotation, observed=tuple(seen)))
        for call in calls:
            call.replace_all_uses_with(call.all_input_nodes[0])
            gm.graph.erase_node(call)

    def ensures(self, gm: fx.GraphModule) -> str | None:
        """No observer is left."""
        left = _observers(gm)
        return f"{left[0].name} is still an observer" if left else None


def _observers(gm: fx.GraphModule) -> list[fx.Node]:
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    return [n for n in calls if isinstance(graph.get_attribute(gm, n.target), Observer)]


def _observed(gm: fx.GraphModule, call: fx.Node) -> ObservedInput:
    observer = graph.get_attribute(gm, str(call.target))
    return ObservedInput(call.all_input_nodes[0].name, observer.name, observer.statistics())
