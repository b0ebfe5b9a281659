"""The four checks on a quantized graph."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx.accuracy.float_graphs import both_graphs
from mono_quant_fx.accuracy.measure import measure_accuracy
from mono_quant_fx.execution.batch import Prepare, leaves
from mono_quant_fx.execution.collection import collect
from mono_quant_fx.execution.noise import alike
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import annotated, stored_weight
from mono_quant_fx.process.surroundings import in_plain_surroundings


@dataclass(frozen=True)
class ValidationResult:
    """The four checks. sqnr_db is None without data, and then the load test compares the tensors only.

    Attributes:
        sqnr_db: of the model output.
        original_bytes, quantized_bytes: of everything that the two graphs store.
        load_test_passed: a state_dict round trip into a blank copy gives equal tensors and equal output.
        weight_range_valid: every scale is finite and positive, every zero point and INT8 code in range.
        errors: what failed, in words.
    """

    sqnr_db: float | None
    original_bytes: int
    quantized_bytes: int
    load_test_passed: bool
    weight_range_valid: bool
    errors: tuple[str, ...] = ()

    @property
    def compression_ratio(self) -> float:
        """original_bytes / quantized_bytes."""
        return self.original_bytes / max(1, self.quantized_bytes)


@in_plain_surroundings
def validate_quantization(
    reference: nn.Module,
    quantized: fx.GraphModule,
    batches: Iterable[Any] | None = None,
    *,
    prepare_batch: Prepare | None = None,
) -> ValidationResult:
    """SQNR, size, load test and weight range of a quantized graph against the captured float graph.

    Raises:
        PreconditionError, CaptureError, CalibrationError: as measure_accuracy.
    """
    reference, quantized, batches = both_graphs(reference, quantized, batches, prepare_batch, "validate_quantization")
    taken = None if batches is None else collect(batches, None, prepare_batch)[0]
    before, after = tensors.total_bytes(reference), tensors.total_bytes(quantized)
    errors = [*_load_errors(quantized, taken), *(ranges := _range_errors(quantized))]
    if after >= before:
        errors.append(f"the quantized graph stores {after} bytes, the float one {before}")
    return ValidationResult(
        measure_accuracy(reference, quantized, taken).output_sqnr_db,
        before,
        after,
        not any(e.startswith("load test") for e in errors),
        not ranges,
        tuple(errors),
    )


def _load_errors(gm: fx.GraphModule, batches: list[Any] | None) -> list[str]:
    blank = copy.deepcopy(gm)
    for _, tensor in tensors.named_tensors(blank):
        with torch.no_grad():
            tensor.zero_()
    state = gm.state_dict()
    blank.load_state_dict(state)
    for name, tensor in tensors.named_tensors(gm):  # what the state_dict leaves out on purpose
        if name not in state:
            tensors.attach(blank, name, tensor, persistent=False)
    errors = [f"load test: {name} differs" for name, t in blank.state_dict().items() if not torch.equal(t, state[name])]
    for batch in (batches or [])[:1]:
        outputs = alike(*(partial(_leaves, tensors.isolate(m), batch) for m in (gm, blank)))
        if not all(_same(a, b) for a, b in zip(*outputs, strict=True)):
            errors.append("load test: the output differs")
    return errors


def _leaves(gm: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        return [v for v in leaves(gm(*batch.args, **batch.kwargs)) if isinstance(v, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, up to the order of sums: a tensor with gaps in memory is loaded into one without, which runs otherwise."""
    if not a.is_floating_point() or a.shape != b.shape or not a.numel():
        return torch.equal(a, b)
    finite = torch.where(torch.isfinite(a), a.abs(), 0.0)
    tolerance = 16 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(finite.max()), equal_nan=True)


def _range_errors(gm: fx.GraphModule) -> list[str]:
    errors = []
    for _, annotation in annotated(gm):
        if not annotation.lowered or annotation.scheme is None:
            continue
        packed, scale, zero_point = stored_weight(gm, annotation)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            errors.append(f"weight range: {annotation.weight}: a scale is not finite and positive")
        low, high = (-8, 7) if annotation.scheme.bits == 4 else (-128, 127)
        if zero_point is not None and not bool(((zero_point >= low) & (zero_point <= high)).all()):
            errors.append(f"weight range: {annotation.weight}: a zero point is outside {low}..{high}")
        if packed.dtype != (torch.int32 if annotation.scheme.bits == 4 else torch.int8):
            errors.append(f"weight range: {annotation.weight}: codes are {packed.dtype}")
    return errors
