"""From an annotated float weight, in its own shape, to stored codes and back."""

from __future__ import annotations

import torch
from torch import Tensor

from mono_quant_fx.errors import WeightError
from mono_quant_fx.graph.annotation import QuantAnnotation
from mono_quant_fx.graph.weight_ops import from_matrix, matrix_shape, to_matrix
from mono_quant_fx.numerics import affine


def codes_of(weight: Tensor, annotation: QuantAnnotation, stage: str) -> affine.QuantizedWeight:
    """The codes that calibration found; without them, the weight rounded to nearest.

    Raises:
        WeightError: the weight cannot be rounded; names `stage` and the weight.
    """
    if annotation.stored is not None:
        return annotation.stored
    assert annotation.scheme is not None
    matrix = to_matrix(weight.detach(), annotation.layout, annotation.groups)
    try:
        return affine.quantize_matrix(matrix, annotation.scheme)
    except WeightError as e:
        raise WeightError(f"{stage}: weight {annotation.weight!r} cannot be quantized: {e}") from e


def hollow_codes(annotation: QuantAnnotation) -> affine.QuantizedWeight:
    """What codes_of gives for a weight, on the meta device."""
    scheme = annotation.scheme
    assert scheme is not None
    rows, columns = matrix_shape(annotation.shape, annotation.layout, annotation.groups)
    int4, groups = scheme.bits == 4, affine.num_groups(columns, scheme.group_size)
    packed = torch.empty(
        rows, -(-columns // 8) if int4 else columns, dtype=torch.int32 if int4 else torch.int8, device="meta"
    )
    scale = torch.empty(rows, groups, dtype=getattr(torch, annotation.dtype), device="meta")
    zero_point = None if scheme.symmetric else torch.empty(rows, groups, dtype=torch.int8, device="meta")
    return affine.QuantizedWeight(packed, scale, zero_point)


def restore(stored: affine.QuantizedWeight, annotation: QuantAnnotation) -> Tensor:
    """The float weight, in its own shape, that stored codes stand for."""
    assert annotation.scheme is not None
    rows = stored.weight_packed.shape[0]
    columns = 1
    for size in annotation.shape:
        columns *= size
    matrix = affine.dequantize_weight(stored, annotation.scheme.group_size, columns // rows)
    return from_matrix(matrix, annotation.layout, annotation.groups, annotation.shape, lambda op, *args: op(*args))
