"""measure_accuracy: fills the table by walking the float and the quantized graph in lockstep over the data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from mono_quant_fx import graph, numerics
from mono_quant_fx.annotation import ObservedInput, QuantAnnotation, annotated, stored_weight
from mono_quant_fx.config import check_thresholds
from mono_quant_fx.data import Batch, Prepare, collect, leaves
from mono_quant_fx.errors import CalibrationError, PreconditionError
from mono_quant_fx.lockstep import Lockstep
from mono_quant_fx.metrics import ErrorSum
from mono_quant_fx.run import Progress
from mono_quant_fx.surroundings import in_plain_surroundings
from mono_quant_fx.table import AccuracyRow, AccuracyTable
from mono_quant_fx.weight_ops import to_matrix

#: dB above which a node needs no second look.
GOOD_DB = 30.0


@in_plain_surroundings
def measure_accuracy(
    reference: fx.GraphModule,
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
        reference: the captured float graph.
        quantized: what a pipeline made of it.
        batches: data to measure outputs on; None measures weights only.
        num_samples: use the first so many samples along dim 0; None uses all.

    Raises:
        PreconditionError: `quantized` carries no annotations, or is not made from `reference`.
        CalibrationError: the data is empty or does not fit.
    """
    check_thresholds(sqnr_warning_threshold, sqnr_error_threshold)
    rows = _weight_rows(reference, quantized)
    if not rows:
        raise PreconditionError("measure_accuracy: no node is annotated; run skip-annotation on the graph first")
    errors: dict[str, _NodeErrors] = defaultdict(_NodeErrors)
    samples = 0
    if batches is not None:
        taken, samples = collect(batches, num_samples or (1 << 62), prepare_batch)
        names = {n.name for n in quantized.graph.nodes} if all_nodes else {r.node for r in rows}
        local_at = {row.node for row in rows if row.weight_sqnr_db is not None}
        _measure(reference, quantized, taken, samples, names, local_at, errors)
    if all_nodes:
        rows = _with_every_node(rows, quantized, errors)
    order = {n.name: i for i, n in enumerate(quantized.graph.nodes)}
    filled = [_fill(row, errors, sqnr_warning_threshold, sqnr_error_threshold) for row in rows]
    filled.sort(key=lambda row: order[row.node])
    output = errors[_OUTPUT].accumulated.sqnr_db if samples else None
    return AccuracyTable(tuple(filled), output, samples)


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
        judged(row, sqnr_warning_threshold, sqnr_error_threshold)
        for node, annotation in annotated(quantized)
        for row in rows_of(annotation, WeightFigures.read(reference, quantized, node, annotation, sqnr_db))
    ]
    order = {n.name: i for i, n in enumerate(quantized.graph.nodes)}
    return AccuracyTable(tuple(sorted(rows, key=lambda row: order[row.node])))


class _NodeErrors:
    def __init__(self) -> None:
        self.accumulated, self.local = ErrorSum(), ErrorSum()


_OUTPUT = "output"


def _measure(
    reference: fx.GraphModule,
    quantized: fx.GraphModule,
    batches: list[Batch],
    samples: int,
    names: set[str],
    local_at: set[str],
    errors: dict[str, _NodeErrors],
) -> None:
    def visit(node: fx.Node, expected: Any, accumulated: Any, local: Any) -> None:
        if node.op != "output" and (node.name not in names or node.op in ("get_attr", "placeholder")):
            return
        entry = errors[_OUTPUT if node.op == "output" else node.name]
        _add(entry.accumulated, expected, accumulated)
        if local is not None:
            _add(entry.local, expected, local)

    twins = graph.isolate(reference), graph.isolate(quantized)
    plan = Lockstep(twins[0], twins[1], local_at)  # type: ignore[arg-type]
    with Progress("measuring accuracy", samples, is_shown=samples > 50) as progress:
        for number, batch in enumerate(batches):
            plan.run(batch, number, visit)
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


def rows_of(annotation: QuantAnnotation, weight: WeightFigures) -> list[AccuracyRow]:
    """One row a user of the weight, with what is known before anything runs."""
    rows = []
    for i, user in enumerate(annotation.users):
        reason = annotation.reason
        if i:
            shared = f"shares the weight of {annotation.users[0].node}"
            reason = f"{shared}; {reason}" if reason else shared
        seen = next((o for o in annotation.observed if o.source == user.input), None)
        if seen is not None and seen.reason:
            reason = "; ".join(filter(None, (reason, f"observer {seen.observer}: {seen.reason}")))
        row = AccuracyRow(
            user.node, user.op, user.module, annotation.weight, weight.scheme, reason, annotation.shape,
            0 if i else weight.before, 0 if i else weight.after, weight.sqnr_db,
            activations=annotation.activations if seen is not None and seen.scale is not None else "",
            observer=seen.observer if seen else "", input_range=_range(seen), algorithm=annotation.algorithm,
            gain_db=annotation.gain_db, int8_gain_db=annotation.int8_gain_db,
            bias_gain_db=annotation.bias_gain_db,
        )  # fmt: skip
        rows.append(row)
    return rows


def _range(seen: ObservedInput | None) -> tuple[float, float] | None:
    if seen is None or not seen.statistics.get("min"):
        return None
    return min(seen.statistics["min"]), max(seen.statistics["max"])


@dataclass(frozen=True)
class WeightFigures:
    """A weight's scheme in words, its bytes before and after, and the SQNR of what is stored (None: as it was)."""

    scheme: str
    before: int
    after: int
    sqnr_db: float | None

    @classmethod
    def read(
        cls,
        reference: fx.GraphModule,
        quantized: fx.GraphModule,
        node: fx.Node,
        annotation: QuantAnnotation,
        sqnr_db: Mapping[str, float | None] | None = None,
    ) -> WeightFigures:
        """Those of an annotated node; its float weight is in `reference`. `sqnr_db` has what was measured before."""
        if not annotation.lowered:
            value = graph.get_attribute(quantized, str(node.target))
            tensors = [value] if isinstance(value, Tensor) else list(value.parameters())
            size = sum(t.nbytes for t in tensors)
            planned = f" ({annotation.scheme} planned)" if annotation.scheme else ""
            return cls(annotation.dtype + planned, size, size, None)
        try:
            weight = graph.get_attribute(reference, annotation.weight)
        except AttributeError as e:
            raise PreconditionError(
                f"measure_accuracy: the float graph has no weight {annotation.weight!r}; give the graph that the "
                "quantized one was made from"
            ) from e
        stored = stored_weight(quantized, annotation)
        size = sum(t.nbytes for t in stored if t is not None)
        measured = weight_sqnr_db(weight, stored, annotation) if sqnr_db is None else sqnr_db[annotation.weight]
        return cls(str(annotation.scheme), weight.nbytes, size, measured)


def weight_sqnr_db(weight: Tensor, stored: numerics.QuantizedWeight, annotation: QuantAnnotation) -> float | None:
    """SQNR of a stored weight against the float one, a tile of rows at a time."""
    total = ErrorSum()
    for error in weight_errors(weight, stored, annotation):
        total.merge(error)
    return total.sqnr_db


def weight_errors(weight: Tensor, stored: numerics.QuantizedWeight, annotation: QuantAnnotation) -> list[ErrorSum]:
    """The error of a weight, or of some of its rows, a tile of rows at a time."""
    assert annotation.scheme is not None
    errors: list[ErrorSum] = []
    matrix = to_matrix(weight.detach(), annotation.layout, annotation.groups)
    step = max(1, numerics.TILE // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        rows = slice(start, start + step)
        part = numerics.QuantizedWeight(*(None if t is None else t[rows] for t in stored))  # type: ignore[arg-type]
        group_size = annotation.scheme.group_size
        errors.append(ErrorSum())
        errors[-1].add(matrix[rows], numerics.dequantize_weight(part, group_size, matrix.shape[1]))
    return errors


def _with_every_node(
    rows: list[AccuracyRow], quantized: fx.GraphModule, errors: dict[str, _NodeErrors]
) -> list[AccuracyRow]:
    known = {row.node for row in rows}
    more = [
        AccuracyRow(n.name, graph.op_name(n), graph.module_path(n), "", "", "", (), 0, 0)
        for n in quantized.graph.nodes
        if n.name not in known and n.name in errors and n.op != "output" and errors[n.name].accumulated.batches
    ]
    return rows + more


def _fill(row: AccuracyRow, errors: dict[str, _NodeErrors], warning_db: float, error_db: float) -> AccuracyRow:
    entry = errors.get(row.node)
    if entry is not None and entry.accumulated.batches:
        row = replace(
            row,
            accumulated_sqnr_db=entry.accumulated.sqnr_db,
            max_abs_error=entry.accumulated.max_abs,
            local_sqnr_db=entry.local.sqnr_db,
        )
    return judged(row, warning_db, error_db)


def judged(row: AccuracyRow, warning_db: float, error_db: float) -> AccuracyRow:
    """The row with the status that its figure deserves; as it is where nothing was measured."""
    db = row.judged_db
    if db is None:
        return row
    status = "critical" if db < error_db else "warning" if db < warning_db else "good" if db > GOOD_DB else "ok"
    return replace(row, status=status)
