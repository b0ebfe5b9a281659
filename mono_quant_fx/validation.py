"""Judgement: accuracy warnings on a result, and the four checks on a quantized graph."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx import graph
from mono_quant_fx.accuracy import measure_accuracy
from mono_quant_fx.annotation import annotated, stored_weight
from mono_quant_fx.collection import collect
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.data import Prepare, leaves
from mono_quant_fx.errors import AccuracyError
from mono_quant_fx.float_graphs import both_graphs
from mono_quant_fx.result import QuantizationResult
from mono_quant_fx.surroundings import in_plain_surroundings
from mono_quant_fx.table import CALIBRATION, AccuracyRow

LEAST_CALIBRATION_SAMPLES = 50


class AccuracyWarning(UserWarning):
    """Quantization went through, and may have cost more accuracy than the user wants."""


def check_accuracy_warnings(
    result: QuantizationResult,
    *,
    accuracy_warning: str = "warn",
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
) -> list[str]:
    """The findings on a result, one line a category, each naming its worst five nodes.

    Categories: nodes (or the model output) below `sqnr_error_threshold` dB, below `sqnr_warning_threshold` dB, every
    layer quantized, and calibration with fewer than 50 samples. "warn" issues each as an AccuracyWarning, "error"
    raises when there is a critical one (and warns of the others), "ignore" only returns them.

    Raises:
        AccuracyError: accuracy_warning is "error" and a critical finding exists; its `result` is the result.
        ConfigError: a threshold or mode is out of range.
    """
    QuantConfig(
        accuracy_warning=accuracy_warning,
        sqnr_warning_threshold=sqnr_warning_threshold,
        sqnr_error_threshold=sqnr_error_threshold,
    )
    critical, others = _findings(
        result.accuracy.rows, result.info.sqnr_db, sqnr_warning_threshold, sqnr_error_threshold
    )
    if not result.info.skipped_layers:
        others.append("All layers were quantized: embeddings, norms and the output layer are usually worth keeping")
    if result.info.measured_on == CALIBRATION:
        others.append(
            f"All figures are measured on calibration data, {result.accuracy.samples} samples: there was too little to "
            "hold any of it out, and on other data they may be lower; give evaluation_data, or more batches"
        )
    if 0 < result.info.calibration_samples_used < LEAST_CALIBRATION_SAMPLES:
        others.append(
            f"Few calibration samples: {result.info.calibration_samples_used} < {LEAST_CALIBRATION_SAMPLES}; the "
            "measured figures may not hold on other data"
        )
    _tell(critical, others, accuracy_warning, result)
    return critical + others


def check_rows(rows: Sequence[AccuracyRow], config: QuantConfig) -> None:
    """Warns or raises, as `config.accuracy_warning` asks, of rows below the thresholds of `config`.

    Raises:
        AccuracyError: accuracy_warning is "error" and a row is critical.
    """
    found = _findings(rows, None, config.sqnr_warning_threshold, config.sqnr_error_threshold)
    _tell(*found, config.accuracy_warning)


def _tell(critical: list[str], others: list[str], accuracy_warning: str, result: object = None) -> None:
    if accuracy_warning != "ignore":
        for message in others if accuracy_warning == "error" else critical + others:
            warnings.warn(message, AccuracyWarning, stacklevel=4)
    if accuracy_warning == "error" and critical:
        raise AccuracyError("; ".join(critical), result)


def _findings(
    rows: Sequence[AccuracyRow], output_db: float | None, warning_db: float, error_db: float
) -> tuple[list[str], list[str]]:
    critical = _below(rows, output_db, -math.inf, error_db, "CRITICAL: far too noisy")
    return critical, _below(rows, output_db, error_db, warning_db, "Low SQNR")


def _below(rows: Sequence[AccuracyRow], output_db: float | None, low: float, high: float, label: str) -> list[str]:
    def within(db: float | None) -> bool:
        return db is not None and low <= db < high

    found = sorted((row for row in rows if within(row.judged_db)), key=lambda row: row.judged_db or 0.0)
    messages = []
    if found:
        worst = ", ".join(_show(row) for row in found[:5])
        messages.append(f"{label}: {len(found)} of {len(rows)} nodes below {high:g} dB: {worst}")
    if within(output_db):
        messages.append(f"{label}: the model output has {output_db:.2f} dB, below {high:g} dB")
    return messages


def _show(row: AccuracyRow) -> str:
    return f"{row.module or row.node} {row.judged_db:.2f} dB"


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
    before, after = graph.total_bytes(reference), graph.total_bytes(quantized)
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
    for _, tensor in graph.named_tensors(blank):
        with torch.no_grad():
            tensor.zero_()
    state = gm.state_dict()
    blank.load_state_dict(state)
    for name, tensor in graph.named_tensors(gm):  # what the state_dict leaves out on purpose
        if name not in state:
            graph.attach(blank, name, tensor, persistent=False)
    errors = [f"load test: {name} differs" for name, t in blank.state_dict().items() if not torch.equal(t, state[name])]
    for batch in (batches or [])[:1]:
        outputs = [_leaves(graph.isolate(m), batch) for m in (gm, blank)]
        if not all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)):
            errors.append("load test: the output differs")
    return errors


def _leaves(gm: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        return [v for v in leaves(gm(*batch.args, **batch.kwargs)) if isinstance(v, Tensor)]


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
