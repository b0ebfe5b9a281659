"""Which passes run, in which order: the whole pipeline, and the tail that every entry shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mono_quant_fx.config import QuantConfig
from mono_quant_fx.errors import ConfigError
from mono_quant_fx.pass_base import Callback, Pass, Pipeline
from mono_quant_fx.passes import (
    ActivationLowering,
    BiasCorrection,
    CalibrationExecution,
    DequantFusion,
    Int4GroupwiseLowering,
    LinearMerging,
    ObserverInsertion,
    SkipAnnotation,
)


def default_pipeline(
    config: QuantConfig | None = None, batches: Iterable[Any] | None = None, callback: Callback | None = None
) -> Pipeline:
    """The passes that quantize runs; without batches nothing is observed and rounding needs the weights only."""
    config = QuantConfig.build(config, {})
    missing = needs_data(config) if batches is None else None
    if missing is not None:
        raise ConfigError(missing)
    decide = SkipAnnotation(config)
    if batches is None:
        return Pipeline((decide, *lowering(config, activations=False)), callback)
    calibration = CalibrationExecution(
        batches,
        config.num_calibration_samples,
        algorithm="gptq" if config.algorithm == "auto" else config.algorithm,
        damping=config.damping,
        desc_act=config.desc_act,
    )
    correction = (BiasCorrection(batches, config.num_calibration_samples),) if config.bias_correction else ()
    tail = lowering(config, activations=config.activations == "int8", correction=correction)
    return Pipeline((decide, ObserverInsertion(config.observer), calibration, *tail), callback)


def with_extra(pipeline: Pipeline, extra_passes: Mapping[str, Pass | Sequence[Pass]]) -> Pipeline:
    """A pipeline with a user's own passes, each under "after NAME" or "before NAME" of a pass that is there.

    Raises:
        ConfigError: a key that says neither, or names no pass of the pipeline; a value that is not a pass.

    >>> from mono_quant_fx.passes import DequantFusion
    >>> twice = with_extra(default_pipeline(), {"after int4-lowering": DequantFusion("float32")})
    >>> [item.name for item in twice.passes]
    ['skip-annotation', 'int4-lowering', 'dequant-fusion', 'dequant-fusion', 'linear-merging']
    """
    insert = {"after": Pipeline.insert_after, "before": Pipeline.insert_before}
    for place, passes in extra_passes.items():
        where, _, name = place.partition(" ") if isinstance(place, str) else ("", "", "")
        if where not in insert:
            names = ", ".join(item.name for item in pipeline.passes)
            raise ConfigError(f"extra_passes: {place!r} is not 'after NAME' or 'before NAME'; names are {names}")
        pipeline = insert[where](pipeline, name, *(passes if isinstance(passes, list | tuple) else [passes]))
    return pipeline


def lowering(config: QuantConfig, *, activations: bool, correction: tuple[Pass, ...] = ()) -> tuple[Pass, ...]:
    """What follows once every weight has a scheme and codes, or a scheme alone: replace, fuse, merge.

    Every entry ends here: quantize, load, import_compressed_tensors, compile_backend and quantize_checkpoint.

    Args:
        config: `activations`, `compute` and `merge_linears` are read.
        activations: whether annotations may hold ranges of INT8 inputs.
        correction: passes that measure the graph with INT8 inputs and float weights.
    """
    inputs: tuple[Pass, ...] = (ActivationLowering(),) if activations else ()
    merge: tuple[Pass, ...] = (LinearMerging(),) if config.merge_linears else ()
    fuse = DequantFusion("int8" if config.activations == "int8_dynamic" else config.compute)
    return (*inputs, *correction, Int4GroupwiseLowering(), fuse, *merge)


def needs_data(config: QuantConfig) -> str | None:
    """The setting that cannot be followed without calibration data, in words; None when none is set."""
    if config.algorithm not in ("auto", "rtn"):
        return f"algorithm={config.algorithm!r} needs calibration_data; without data there is 'rtn'"
    if config.activations == "int8":
        return "activations='int8' needs calibration_data, which sets their ranges; 'int8_dynamic' needs none"
    if config.bias_correction:
        return "bias_correction=True needs calibration_data, on which the mean error is measured"
    return None
