"""measure_accuracy: fills the table by walking the float and the quantized graph in lockstep over the data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from mono_quant_fx.accuracy.float_graphs import both_graphs
from mono_quant_fx.accuracy.judging import with_statuses
from mono_quant_fx.accuracy.outputs import OutputSums, headline
from mono_quant_fx.accuracy.row import AccuracyRow
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.accuracy.weight_figures import WeightFigures, rows_of
from mono_quant_fx.config import check_thresholds
from mono_quant_fx.errors import CalibrationError, PreconditionError
from mono_quant_fx.execution.batch import Batch, Prepare, leaves
from mono_quant_fx.execution.collection import collect
from mono_quant_fx.execution.lockstep import Lockstep
from mono_quant_fx.execution.run import Progress
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.numerics.error import ErrorSum
from mono_quant_fx.process.surroundings import in_plain_surroundings


@in_plain_surroundings
def measure_accuracy(
    reference: nn.Module,
    quantized: fx.GraphModule,
    batches: Iterable[Any] | None = None,
    *,
    all_nodes: bool = False,
    num_samples: int | None = None,
    prepare_batch: Prepare | None = None,
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
) -> AccuracyTable:
    """One row a weight-carrying node, in execution order (`all_nodes`: one a floating-point node).

    Args:
        reference: the captured float graph, or the model, which is then captured as it was for `quantized`.
        quantized: what a pipeline made of it.
        batches: data to measure outputs on; None measures weights only.
        num_samples: use the first so many samples along dim 0; None uses all. A batch whose dim 0 is not certainly the
            batch's is not cut.

    Raises:
        PreconditionError: `quantized` carries no annotations, or is not made from `reference`; or no graph was given.
        CaptureError: `reference` is a model, and has no graph.
        CalibrationError: the data is empty or does not fit.
    """
    check_thresholds(sqnr_warning_threshold, sqnr_error_threshold)
    reference, quantized, batches = both_graphs(reference, quantized, batches, prepare_batch, "measure_accuracy")
    rows = _weight_rows(reference, quantized)
    if not rows:
        raise PreconditionError("measure_accuracy: no node is annotated; run skip-annotation on the graph first")
    errors: dict[str, _NodeErrors] = defaultdict(_NodeErrors)
    outputs, samples = OutputSums(quantized), 0
    if batches is not None:
        taken, samples = collect(batches, num_samples, prepare_batch, reference)
        names = {n.name for n in quantized.graph.nodes} if all_nodes else {r.node for r in rows}
        local_at = {row.node for row in rows if row.weight_sqnr_db is not None}
        _measure((reference, quantized), taken, names, local_at, errors, outputs)
    if all_nodes:
        rows = _with_every_node(rows, quantized, errors)
    order = {n.name: i for i, n in enumerate(quantized.graph.nodes)}
    filled = sorted((_fill(row, errors) for row in rows), key=lambda row: order[row.node])
    judged, figures = with_statuses(filled, sqnr_warning_threshold, sqnr_error_threshold), outputs.figures()
    return AccuracyTable(tuple(judged), headline(figures), samples, outputs=figures)


def weights_table(
    reference: fx.GraphModule,
    quantized: fx.GraphModule,
    sqnr_db: Mapping[str, float | None],
    *,
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
) -> AccuracyTable:
    """The table that measure_accuracy makes without data, of graphs whose tensors may be on the meta device.

    Args:
        sqnr_db: name of a lowered weight -> its SQNR, as weight_sqnr_db has it.
    """
    rows = [
        row
        for node, annotation in annotated(quantized)
        for row in rows_of(annotation, WeightFigures.read(reference, quantized, node, annotation, sqnr_db))
    ]
    order = {n.name: i for i, n in enumerate(quantized.graph.nodes)}
    rows.sort(key=lambda row: order[row.node])
    return AccuracyTable(tuple(with_statuses(rows, sqnr_warning_threshold, sqnr_error_threshold)))


class _NodeErrors:
    def __init__(self) -> None:
        self.accumulated, self.local = ErrorSum(), ErrorSum()


def _measure(
    graphs: tuple[fx.GraphModule, fx.GraphModule],
    batches: list[Batch],
    names: set[str],
    local_at: set[str],
    errors: dict[str, _NodeErrors],
    outputs: OutputSums,
) -> None:
    def visit(node: fx.Node, expected: Any, accumulated: Any, local: Any) -> None:
        if node.op == "output":
            outputs.add(expected, accumulated)
        elif node.name in names and node.op not in ("get_attr", "placeholder"):
            entry = errors[node.name]
            _add(entry.accumulated, expected, accumulated)
            if local is not None:
                _add(entry.local, expected, local)

    twins = [tensors.isolate(gm) for gm in graphs]
    samples = sum(batch.samples() for batch in batches)
    plan = Lockstep(twins[0], twins[1], local_at)  # type: ignore[arg-type]
    with Progress("measuring accuracy", samples, is_shown=samples > 50) as progress:
        for batch in batches:
            plan.run(batch, visit)
            progress.advance(batch.samples())


def _add(total: ErrorSum, expected: Any, actual: Any) -> None:
    pairs = zip(leaves(expected), leaves(actual), strict=True)
    for a, b in pairs:
        if isinstance(a, Tensor) and a.is_floating_point():
            if a.shape != b.shape:
                raise CalibrationError(f"the graphs disagree on a shape: {tuple(a.shape)} and {tuple(b.shape)}")
            total.add(a, b)


def _weight_rows(reference: fx.GraphModule, quantized: fx.GraphModule) -> list[AccuracyRow]:
    return [
        row
        for node, annotation in annotated(quantized)
        for row in rows_of(annotation, WeightFigures.read(reference, quantized, node, annotation))
    ]


def _with_every_node(
    rows: list[AccuracyRow], quantized: fx.GraphModule, errors: dict[str, _NodeErrors]
) -> list[AccuracyRow]:
    known = {row.node for row in rows}
    more = [
        AccuracyRow(n.name, tensors.op_name(n), tensors.module_path(n), "", "", "", (), 0, 0)
        for n in quantized.graph.nodes
        if n.name not in known and n.name in errors and n.op != "output" and errors[n.name].accumulated.batches
    ]
    return rows + more


def _fill(row: AccuracyRow, errors: dict[str, _NodeErrors]) -> AccuracyRow:
    entry = errors.get(row.node)
    if entry is None or not entry.accumulated.batches:
        return row
    return replace(
        row,
        accumulated_sqnr_db=entry.accumulated.sqnr_db,
        max_abs_error=entry.accumulated.max_abs,
        local_sqnr_db=entry.local.sqnr_db,
    )
