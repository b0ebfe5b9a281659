"""From an annotated float weight, in its own shape, to stored codes and back."""

from __future__ import annotations

from torch import Tensor

from mono_quant_fx import numerics
from mono_quant_fx.annotation import QuantAnnotation
from mono_quant_fx.errors import WeightError
from mono_quant_fx.weight_ops import from_matrix, to_matrix


def codes_of(weight: Tensor, annotation: QuantAnnotation, stage: str) -> numerics.QuantizedWeight:
    """The codes that calibration found; without them, the weight rounded to nearest.

    Raises:
        WeightError: the weight cannot be rounded; names `stage` and the weight.
    """
    if annotation.stored is not None:
        return annotation.stored
    assert annotation.scheme is not None
    matrix = to_matrix(weight.detach(), annotation.layout, annotation.groups)
    try:
        return numerics.quantize_matrix(matrix, annotation.scheme)
    except WeightError as e:
        raise WeightError(f"{stage}: weight {annotation.weight!r} cannot be quantized: {e}") from e


def restore(stored: numerics.QuantizedWeight, annotation: QuantAnnotation) -> Tensor:
    """The float weight, in its own shape, that stored codes stand for."""
    assert annotation.scheme is not None
    rows = stored.weight_packed.shape[0]
    columns = 1
    for size in annotation.shape:
        columns *= size
    matrix = numerics.dequantize_weight(stored, annotation.scheme.group_size, columns // rows)
    return from_matrix(matrix, annotation.layout, annotation.groups, annotation.shape, lambda op, *args: op(*args))
