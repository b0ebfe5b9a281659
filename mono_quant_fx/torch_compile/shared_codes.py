"""Codes by the float tensor that they stand for: made once, shared, made anew when the tensor changes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mono_quant_fx.accuracy.weight_figures import weight_sqnr_db
from mono_quant_fx.errors import WeightError
from mono_quant_fx.graph.annotation import QuantAnnotation
from mono_quant_fx.graph.codes import codes_of
from mono_quant_fx.numerics.affine import QuantizedWeight

Stamp = tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """The codes of one tensor under one scheme, as of `stamp`, and their SQNR against it in dB."""

    tensor: weakref.ref[Tensor]
    stamp: Stamp
    stored: QuantizedWeight
    sqnr_db: float | None

    def is_of(self, tensor: Tensor) -> bool:
        """Whether these are the tensor's codes as it is now."""
        return self.tensor() is tensor and self.stamp == stamp(tensor)


def stamp(tensor: Tensor) -> Stamp:
    """Changes when the tensor is written into, or given other data.

    Writing through `.data`, or into a tensor made under inference_mode, leaves no trace.
    """
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()


class SharedCodes:
    """Entries by tensor, as long as the tensor lives."""

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor, annotation: QuantAnnotation) -> Entry:
        """The codes that `annotation` asks for.

        Raises:
            WeightError: the tensor holds NaN or infinity, or is not what the annotation was made for.
        """
        if tuple(tensor.shape) != annotation.shape or str(tensor.dtype) != f"torch.{annotation.dtype}":
            raise WeightError(
                f"{annotation.weight} is {str(tensor.dtype)[6:]}{list(tensor.shape)}, but the graph was compiled for "
                f"{annotation.dtype}{list(annotation.shape)}; call torch.compiler.reset()"
            )
        kept = self._entries.setdefault(tensor, {})
        key = (annotation.scheme, annotation.layout, annotation.groups)
        if key not in kept or not kept[key].is_of(tensor):
            kept[key] = _encode(tensor, annotation)
        return kept[key]


def _encode(tensor: Tensor, annotation: QuantAnnotation) -> Entry:
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be saved for a gradient
        before = stamp(tensor)
        stored = codes_of(tensor, annotation, "compile-backend")
        return Entry(weakref.ref(tensor), before, stored, weight_sqnr_db(tensor.detach(), stored, annotation))
