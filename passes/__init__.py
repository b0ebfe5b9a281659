"""The passes, one a file, in the order in which they run."""

from mono_quant_fx.passes.skip_annotation import SkipAnnotation  # isort: skip
from mono_quant_fx.passes.plan_restoration import PlanRestoration  # isort: skip
from mono_quant_fx.passes.code_attachment import CodeAttachment  # isort: skip
from mono_quant_fx.passes.observer_insertion import ObserverInsertion  # isort: skip
from mono_quant_fx.passes.calibration_execution import CalibrationExecution  # isort: skip
from mono_quant_fx.passes.activation_lowering import ActivationLowering  # isort: skip
from mono_quant_fx.passes.bias_correction import BiasCorrection  # isort: skip
from mono_quant_fx.passes.int4_groupwise_lowering import Int4GroupwiseLowering  # isort: skip
from mono_quant_fx.passes.dequant_fusion import DequantFusion  # isort: skip
from mono_quant_fx.passes.linear_merging import LinearMerging  # isort: skip

__all__ = [
    "ActivationLowering",
    "BiasCorrection",
    "CalibrationExecution",
    "CodeAttachment",
    "DequantFusion",
    "Int4GroupwiseLowering",
    "LinearMerging",
    "ObserverInsertion",
    "PlanRestoration",
    "SkipAnnotation",
]
