"""The whole compiler as one readable column: capture, the pipeline, the table, the figures."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import fx, nn

from mono_quant_fx.accuracy.coverage import coverage_notes
from mono_quant_fx.accuracy.findings import AccuracyWarning, check_accuracy_warnings
from mono_quant_fx.accuracy.held_out import Split, split
from mono_quant_fx.accuracy.info import info_of
from mono_quant_fx.accuracy.measure import measure_accuracy
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.errors import PreconditionError
from mono_quant_fx.execution.batch import Prepare
from mono_quant_fx.execution.collection import UNLIMITED, Reading, read
from mono_quant_fx.execution.values import require_inputs, require_values
from mono_quant_fx.frontend.capture import captured
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.pass_base import Pass
from mono_quant_fx.pipelines import default_pipeline, with_extra
from mono_quant_fx.storage.result import QuantizationResult

T = TypeVar("T")


def quantize(
    model: nn.Module | fx.GraphModule,
    example_inputs: Any = None,
    *,
    calibration_data: Iterable[Any] | None = None,
    evaluation_data: Iterable[Any] | None = None,
    config: QuantConfig | None = None,
    prepare_batch: Prepare | None = None,
    extra_passes: Mapping[str, Pass | Sequence[Pass]] | None = None,
    **config_fields: Any,
) -> QuantizationResult:
    """Quantizes a model in eval mode after training; the model is not touched, and shares what stays float.

    Args:
        model: an nn.Module, or a GraphModule that capture returned.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. May be left out where symbolic
            tracing succeeds or where data is given (its first batch is the example).
        calibration_data: an iterable of such batches; the first `num_calibration_samples` samples along dim 0 are used.
        evaluation_data: likewise; all of it is what the result is judged on. Without it, calibration data is held out:
            what it has past the samples to calibrate on (as many again at most), else a fifth of its batches, or the
            last fifth of the samples of fewer than five. Where that cannot be, the table says that the figures are of
            calibration data.
            Without any data only the weights are judged.
        config: a QuantConfig; `config_fields` are its fields as keywords and win over it.
        prepare_batch: turns a batch of either data into the model's arguments, e.g. ``lambda b: b[0]``.
        extra_passes: passes of your own by their place in default_pipeline, ``{"after skip-annotation": MyPass()}``;
            the table and the figures count what they do.

    Raises:
        ConfigError, PatternError: a bad setting. CaptureError: no graph. CalibrationError: data that does not fit.
        WeightError: NaN or infinity in a weight, or a tensor without values.
        NothingQuantizedError: every weight would be skipped. PreconditionError: the graph is quantized already.
        AccuracyError: accuracy_warning="error" and a critical finding; carries the result.

    >>> model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    >>> result = quantize(model, group_size=64)
    >>> [(row.module, row.scheme) for row in result.accuracy.rows]
    [('0', 'int4 g64 sym'), ('2', 'int4 g64 sym')]
    """
    config = QuantConfig.build(config, config_fields)
    require_values(model)
    clock = _Clock()
    given = _read(calibration_data, evaluation_data, config, prepare_batch)
    if example_inputs is None:
        example_inputs = next((reading.batches[0] for reading in given if reading is not None), None)
    require_inputs(example_inputs, [batch for reading in given if reading is not None for batch in reading.batches])
    gm, notes = clock.time("capture", lambda: captured(model, example_inputs))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    require_float(gm)
    data = split(gm, *given, config.num_calibration_samples)
    pipeline = with_extra(default_pipeline(config, data.calibration, clock.lap), extra_passes or {})
    out = pipeline(gm).graph_module
    table = clock.time("accuracy", lambda: _measure(gm, out, data, config))
    samples = 0 if data.calibration is None else data.calibration.samples
    info = info_of(gm, out, table, config, samples, clock.seconds)
    result = QuantizationResult(out, table, info, config)
    ours = [*data.notes, *coverage_notes(gm, table, model)]
    info.warnings += [*notes, *ours]
    info.warnings += check_accuracy_warnings(result, accuracy_warning="ignore", **_thresholds(config))
    for note in ours if config.accuracy_warning != "ignore" else ():
        warnings.warn(note, AccuracyWarning, stacklevel=2)
    check_accuracy_warnings(result, accuracy_warning=config.accuracy_warning, **_thresholds(config))
    return result


def require_float(gm: fx.GraphModule) -> None:
    """Raises PreconditionError if a weight of the graph is quantized already."""
    done = [annotation.weight for _, annotation in annotated(gm) if annotation.lowered]
    if done:
        raise PreconditionError(
            f"quantize: the graph is quantized already ({len(done)} weights, {done[0]!r} is one); to quantize it in "
            "another way give the float model, or what mq.dequantize_model(graph) makes of it first"
        )


class _Clock:
    """Seconds by stage: the passes report through the pipeline's callback, everything else through time()."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, stage: Pass, *_: object) -> None:
        now = time.perf_counter()
        self.seconds[stage.name], self.last = now - self.last, now

    def time(self, stage: str, work: Callable[[], T]) -> T:
        self.last = time.perf_counter()
        value = work()
        now = time.perf_counter()
        self.seconds[stage], self.last = now - self.last, now
        return value


def _thresholds(config: QuantConfig) -> dict[str, Any]:
    names = ("sqnr_warning_threshold", "sqnr_error_threshold")
    return {name: getattr(config, name) for name in names}


def _read(
    calibration: Iterable[Any] | None, evaluation: Iterable[Any] | None, config: QuantConfig, prepare: Prepare | None
) -> tuple[Reading | None, Reading | None]:
    """Of the calibration data as much again as is calibrated on, to judge on, where no evaluation data is given."""
    limit = config.num_calibration_samples * (2 if evaluation is None else 1)
    return (
        None if calibration is None else read(calibration, limit, prepare),
        None if evaluation is None else read(evaluation, UNLIMITED, prepare, "evaluation_data"),
    )


def _measure(gm: fx.GraphModule, out: fx.GraphModule, data: Split, config: QuantConfig) -> AccuracyTable:
    table = measure_accuracy(gm, out, data.evaluation, **_thresholds(config))
    return replace(table, measured_on=data.measured_on)
