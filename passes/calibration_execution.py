"""calibration: runs the observed graph on the data. After it annotations hold what was seen; observers are gone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, fx

from mono_quant_fx.calibration.observers import Observer
from mono_quant_fx.calibration.sequential_rounding import SequentialWalk
from mono_quant_fx.errors import WeightError
from mono_quant_fx.execution.batch import Batch, Prepare
from mono_quant_fx.execution.collection import collect
from mono_quant_fx.execution.run import Progress, run_batch
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import ObservedInput, QuantAnnotation, annotated, pending, set_annotation
from mono_quant_fx.graph.arguments import argument
from mono_quant_fx.graph.weight_ops import to_matrix
from mono_quant_fx.graph.weight_table import consumption
from mono_quant_fx.numerics.rounding import Rounded, RoundingOptions, round_weight
from mono_quant_fx.pass_base import Pass

#: The reason for an input that got no values, such as an expert's without tokens.
UNSEEN = "no calibration data reached this input"


@dataclass(frozen=True)
class CalibrationExecution(Pass):
    """Feeds the first `num_calibration_samples` of `batches` through the graph, without gradients.

    With algorithm "clip" or "gptq" it also rounds each weight on the way (see calibration/sequential_rounding.py): what
    comes after a weight sees the rounded one. Nothing is replaced here; codes and statistics go to the annotations.

    Raises:
        CalibrationError: no data, a batch that does not fit, or an op that fails; names the node and the batch.
        WeightError: a weight that cannot be rounded; names it.
    """

    batches: Iterable[Any] = field(repr=False)
    num_calibration_samples: int = 150
    prepare_batch: Prepare | None = field(default=None, repr=False)
    algorithm: str = "rtn"
    damping: float = 0.01
    desc_act: bool = False
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
        nodes = {n.name: n for n in gm.graph.nodes}
        batches, samples = collect(self.batches, self.num_calibration_samples, self.prepare_batch, gm)
        twin = tensors.isolate(gm)
        assert isinstance(twin, fx.GraphModule)
        for call in calls:
            tensors.get_attribute(twin, str(call.target)).reset()
        rounded = self._walk(twin, batches, samples) if self.algorithm != "rtn" else _run(twin, batches, samples)
        for node, annotation in list(pending(gm)):
            seen = [_observed(twin, call, annotation.activations) for call in _read_by(node, annotation, nodes, calls)]
            found = rounded.get(annotation.weight, Rounded(None, "rtn"))
            reason = "; ".join(filter(None, (annotation.reason, found.reason)))
            annotation = replace(annotation, reason=reason, observed=tuple(seen), stored=found.stored)
            annotation = replace(annotation, algorithm=found.algorithm, gain_db=found.gain_db)
            set_annotation(node, replace(annotation, int8_gain_db=found.int8_gain_db))
        for call in calls:
            call.replace_all_uses_with(call.all_input_nodes[0])
            gm.graph.erase_node(call)

    def _walk(self, gm: fx.GraphModule, batches: list[Batch], samples: int) -> dict[str, Rounded]:
        options = RoundingOptions(self.algorithm, self.damping, self.desc_act)
        total = sum(1 for _ in pending(gm))
        rounded: dict[str, Rounded] = {}
        with Progress("calibrating", total, "weights", is_shown=samples > 50) as progress:

            def round_one(node: fx.Node, annotation: QuantAnnotation, hessian: Tensor | None, why: str) -> Rounded:
                weight = tensors.get_tensor(gm, node)
                assert weight is not None and annotation.scheme is not None
                matrix = to_matrix(weight.detach(), annotation.layout, annotation.groups).contiguous()
                try:
                    found = round_weight(matrix, annotation.scheme, hessian, options, why)
                except WeightError as e:
                    raise WeightError(f"calibration: weight {annotation.weight!r} cannot be quantized: {e}") from e
                rounded[annotation.weight] = found
                sqnr = "" if found.sqnr_db is None else f", {found.sqnr_db:.1f} dB"
                progress.advance(1, f"{annotation.users[0].node}{sqnr}")
                return found

            SequentialWalk(gm, batches, round_one).run()
        return rounded

    def ensures(self, gm: fx.GraphModule) -> str | None:
        """No observer is left."""
        left = _observers(gm)
        return f"{left[0].name} is still an observer" if left else None


def _run(gm: fx.GraphModule, batches: list[Batch], samples: int) -> dict[str, Rounded]:
    """Only observes: rounding to nearest needs no inputs, so nothing has to be held from node to node."""
    with Progress("calibrating", samples, is_shown=samples > 50) as progress:
        for batch in batches:
            run_batch(gm, batch)
            progress.advance(batch.samples())
    return {}


def _observers(gm: fx.GraphModule) -> list[fx.Node]:
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    return [n for n in calls if isinstance(tensors.get_attribute(gm, n.target), Observer)]


def _read_by(
    weight: fx.Node, annotation: QuantAnnotation, nodes: dict[str, fx.Node], observers: list[fx.Node]
) -> list[fx.Node]:
    """The observers that the ops of a weight read, in the order of the graph."""
    users = [user for use in annotation.users if (user := nodes.get(use.node)) is not None]
    rows = [(user, row) for user in users if (row := consumption(user, weight)) is not None]
    read = {argument(user, row.input) for user, row in rows}
    return [call for call in observers if call in read]


def _observed(gm: fx.GraphModule, call: fx.Node, activations: str) -> ObservedInput:
    observer, source = tensors.get_attribute(gm, str(call.target)), call.all_input_nodes[0]
    if not observer.has_seen:
        return ObservedInput(source.name, observer.name, reason=UNSEEN + (", so it stays float" if activations else ""))
    if not activations:
        return ObservedInput(source.name, observer.name, observer.statistics())
    name, reason = observer.chosen()
    scale, zero_point = observer.calculate_qparams(8, activations == "int8 sym")
    return ObservedInput(source.name, name, observer.statistics(), reason, float(scale), int(zero_point))
