"""Warnings on a result: what is too noisy, what could not be judged, and on how little data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Protocol

from torch import fx

from mono_quant_fx.accuracy.info import QuantizationInfo
from mono_quant_fx.accuracy.judging import UNUSUAL_DB, Verdict, verdicts
from mono_quant_fx.accuracy.row import AccuracyRow
from mono_quant_fx.accuracy.table import CALIBRATION, AccuracyTable
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.errors import AccuracyError, PreconditionError
from mono_quant_fx.graph.annotation import annotated

LEAST_CALIBRATION_SAMPLES = 50
#: How many of the worst a finding names.
SHOWN = 5


class Judged(Protocol):
    """What check_accuracy_warnings needs of a QuantizationResult."""

    graph_module: fx.GraphModule
    accuracy: AccuracyTable
    info: QuantizationInfo


class AccuracyWarning(UserWarning):
    """Quantization went through, and may have cost more accuracy than the user wants."""


def check_accuracy_warnings(
    result: Judged,
    *,
    accuracy_warning: str = "warn",
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
) -> list[str]:
    """The findings on a result, one line a category, each naming its worst five nodes.

    Categories: nodes (or the model output) below `sqnr_error_threshold` dB, below `sqnr_warning_threshold` dB, only
    weights to judge (and which of them are unusually bad for their scheme), figures of calibration data, every layer
    quantized, and calibration with fewer than 50 samples. "warn" issues each as an AccuracyWarning, "error" raises when
    there is a critical one (and warns of the others), "ignore" only returns them.

    Raises:
        AccuracyError: accuracy_warning is "error" and a critical finding exists; its `result` is the result.
        ConfigError: a threshold or mode is out of range. PreconditionError: no result of quantize is given.
    """
    if not all(hasattr(result, part) for part in ("graph_module", "accuracy", "info")):
        raise PreconditionError(
            f"check_accuracy_warnings: what mq.quantize returned is needed, not {type(result).__name__}; "
            "mq.measure_accuracy fills a table for a graph of your own"
        )
    QuantConfig(
        accuracy_warning=accuracy_warning,
        sqnr_warning_threshold=sqnr_warning_threshold,
        sqnr_error_threshold=sqnr_error_threshold,
    )
    table, info = result.accuracy, result.info
    critical, others = _findings(table.rows, table, sqnr_warning_threshold, sqnr_error_threshold)
    if info.measured_on == CALIBRATION:
        others.append(
            f"All figures are measured on calibration data, {table.samples} samples: there was too little to hold any "
            "of it out, and on other data they may be lower; give evaluation_data, or more batches"
        )
    if not info.skipped_layers:
        others.append("All layers were quantized: embeddings, norms and the output layer are usually worth keeping")
    wide = [a.weight for _, a in annotated(result.graph_module) if a.lowered and a.dtype == "float64"]
    if wide:
        others.append(
            f"{len(wide)} weights are float64: their codes and scales are worked out to float32 precision, and figures "
            "count that as quantization"
        )
    if 0 < info.calibration_samples_used < LEAST_CALIBRATION_SAMPLES:
        others.append(
            f"Few calibration samples: {info.calibration_samples_used} < {LEAST_CALIBRATION_SAMPLES}; the measured "
            "figures may not hold on other data"
        )
    _tell(critical, others, accuracy_warning, result)
    return critical + others


def check_rows(rows: Sequence[AccuracyRow], config: QuantConfig) -> None:
    """Warns or raises, as `config.accuracy_warning` asks, of rows that are critical or worth a warning.

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
    rows: Sequence[AccuracyRow], table: AccuracyTable | None, warning_db: float, error_db: float
) -> tuple[list[str], list[str]]:
    found = list(zip(rows, verdicts(rows, warning_db, error_db), strict=True))
    output_db = None if table is None else table.output_sqnr_db
    measured = [(row, verdict) for row, verdict in found if row.local_sqnr_db is not None]
    critical = _below(measured, len(rows), "critical", f"CRITICAL: far too noisy: {{}} below {error_db:g} dB")
    critical += _output(table, output_db, -math.inf, error_db, "CRITICAL: far too noisy")
    others = _below(measured, len(rows), "warning", f"Low SQNR: {{}} below {warning_db:g} dB")
    others += _output(table, output_db, error_db, warning_db, "Low SQNR")
    weights = [(row, verdict) for row, verdict in found if row.local_sqnr_db is None and verdict.db is not None]
    bad = f"{UNUSUAL_DB:g} dB or more below what a normally distributed weight has at its scheme"
    critical += _below(
        weights, len(rows), "critical", f"CRITICAL: far too noisy: {{}} below {error_db:g} dB, and {bad}"
    )
    others += _below(weights, len(rows), "warning", f"Low SQNR: {{}} {bad}")
    if weights and table is not None and not table.samples:
        unusual = sum(verdict.remark != "" for _, verdict in weights)
        others.append(
            f"Only weights could be judged, without calibration_data or evaluation_data: {unusual or 'none'} of the "
            f"{len(weights)} quantized ones {'is' if unusual < 2 else 'are'} {bad}"
        )
    return critical, others


def _below(found: Sequence[tuple[AccuracyRow, Verdict]], total: int, status: str, words: str) -> list[str]:
    chosen = sorted(
        ((row, verdict) for row, verdict in found if verdict.status == status), key=lambda pair: pair[1].db or 0.0
    )
    if not chosen:
        return []
    worst = ", ".join(_show(*pair) for pair in chosen[:SHOWN])
    return [f"{words.format(f'{len(chosen)} of {total} nodes')}: {worst}"]


def _show(row: AccuracyRow, verdict: Verdict) -> str:
    return " ".join(filter(None, (row.module or row.node, f"{verdict.db:.2f} dB", verdict.remark)))


def _output(table: AccuracyTable | None, db: float | None, low: float, high: float, label: str) -> list[str]:
    if table is None or db is None or not low <= db < high:
        return []
    name = next((f" {figure.name!r}" for figure in table.outputs if figure.depends and figure.sqnr_db == db), "")
    name = name if len(table.outputs) > 1 else ""
    return [f"{label}: the model output{name} has {db:.2f} dB, below {high:g} dB"]
