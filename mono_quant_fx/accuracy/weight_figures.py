"""What the table knows of a weight before anything runs: scheme, bytes, what calibration saw, SQNR of the codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from mono_quant_fx.accuracy.row import AccuracyRow
from mono_quant_fx.errors import PreconditionError
from mono_quant_fx.graph.annotation import ObservedInput, QuantAnnotation, stored_weight
from mono_quant_fx.graph.own_names import own_name
from mono_quant_fx.graph.tensors import get_attribute
from mono_quant_fx.graph.weight_ops import matrix_shape, to_matrix
from mono_quant_fx.numerics import affine
from mono_quant_fx.numerics.error import ErrorSum
from mono_quant_fx.numerics.normal_weights import normal_sqnr_db


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
            user.node, user.op, user.module, weight.name or annotation.weight, weight.scheme, reason, annotation.shape,
            0 if i else weight.before, 0 if i else weight.after, weight.sqnr_db,
            activations=annotation.activations if seen is not None and seen.scale is not None else "",
            observer=seen.observer if seen else "", input_range=_range(seen), algorithm=annotation.algorithm,
            gain_db=annotation.gain_db, int8_gain_db=annotation.int8_gain_db,
            bias_gain_db=annotation.bias_gain_db,
            normal_sqnr_db=None if weight.sqnr_db is None else _normal(annotation),
        )  # fmt: skip
        rows.append(row)
    return rows


def _normal(annotation: QuantAnnotation) -> float | None:
    if annotation.scheme is None:
        return None
    return normal_sqnr_db(annotation.scheme, matrix_shape(annotation.shape, annotation.layout, annotation.groups)[1])


def _range(seen: ObservedInput | None) -> tuple[float, float] | None:
    if seen is None or not seen.statistics.get("min"):
        return None
    return min(seen.statistics["min"]), max(seen.statistics["max"])


@dataclass(frozen=True)
class WeightFigures:
    """A weight's scheme in words, its bytes before and after, the SQNR of what is stored (None: as it was), its name.

    The name is the user's own (see graph/own_names.py).
    """

    scheme: str
    before: int
    after: int
    sqnr_db: float | None
    name: str = ""

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
            value = get_attribute(quantized, str(node.target))
            tensors = [value] if isinstance(value, Tensor) else list(value.parameters())
            size = sum(t.nbytes for t in tensors)
            planned = f" ({annotation.scheme} planned)" if annotation.scheme else ""
            return cls(annotation.dtype + planned, size, size, None, own_name(quantized, annotation.weight))
        try:
            weight = get_attribute(reference, annotation.weight)
        except AttributeError as e:
            raise PreconditionError(
                f"measure_accuracy: the float graph has no weight {annotation.weight!r}; give the graph that the "
                "quantized one was made from"
            ) from e
        stored = stored_weight(quantized, annotation)
        size = sum(t.nbytes for t in stored if t is not None)
        measured = weight_sqnr_db(weight, stored, annotation) if sqnr_db is None else sqnr_db[annotation.weight]
        return cls(str(annotation.scheme), weight.nbytes, size, measured, own_name(quantized, annotation.weight))


def weight_sqnr_db(weight: Tensor, stored: affine.QuantizedWeight, annotation: QuantAnnotation) -> float | None:
    """SQNR of a stored weight against the float one, a tile of rows at a time."""
    total = ErrorSum()
    for error in weight_errors(weight, stored, annotation):
        total.merge(error)
    return total.sqnr_db


def weight_errors(weight: Tensor, stored: affine.QuantizedWeight, annotation: QuantAnnotation) -> list[ErrorSum]:
    """The error of a weight, or of some of its rows, a tile of rows at a time."""
    assert annotation.scheme is not None
    errors: list[ErrorSum] = []
    matrix = to_matrix(weight.detach(), annotation.layout, annotation.groups)
    step = max(1, affine.TILE // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        rows = slice(start, start + step)
        part = affine.QuantizedWeight(*(None if t is None else t[rows] for t in stored))  # type: ignore[arg-type]
        group_size = annotation.scheme.group_size
        errors.append(ErrorSum())
        errors[-1].add(matrix[rows], affine.dequantize_weight(part, group_size, matrix.shape[1]))
    return errors
