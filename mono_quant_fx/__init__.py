"""A torch.fx compiler that quantizes PyTorch models after training and tells the truth about each node."""

from mono_quant_fx import passes
from mono_quant_fx.accuracy.bisection import bisect
from mono_quant_fx.accuracy.bisection_report import Bisection, BisectionStep, Suspect
from mono_quant_fx.accuracy.findings import AccuracyWarning, check_accuracy_warnings
from mono_quant_fx.accuracy.info import QuantizationInfo
from mono_quant_fx.accuracy.measure import measure_accuracy
from mono_quant_fx.accuracy.row import AccuracyRow
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.accuracy.validation import ValidationResult, validate_quantization
from mono_quant_fx.calibration.auto_observer import ExperimentalWarning, select_observer
from mono_quant_fx.calibration.observers import (
    HistogramObserver,
    InputEnergyObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    Observer,
    PercentileObserver,
    create_observer,
)
from mono_quant_fx.compiler import quantize
from mono_quant_fx.config import DEFAULT_INT4_SKIP, QuantConfig, QuantScheme
from mono_quant_fx.errors import (
    AccuracyError,
    CalibrationError,
    CaptureError,
    CheckpointError,
    ConfigError,
    FileFormatError,
    GraphFormatError,
    InputError,
    MonoQuantError,
    NothingQuantizedError,
    NotSelfContainedError,
    PassError,
    PatternError,
    PerformanceWarning,
    PlanError,
    PostconditionError,
    PreconditionError,
    UnknownNameError,
    WeightError,
)
from mono_quant_fx.frontend.capture import capture
from mono_quant_fx.graph.provenance import Step, history
from mono_quant_fx.graph.text import diff_graphs, format_graph
from mono_quant_fx.interop.exporting import export_compressed_tensors
from mono_quant_fx.interop.importing import import_compressed_tensors
from mono_quant_fx.numerics.affine import QuantizedWeight, quantize_weight_int4
from mono_quant_fx.numerics.error import max_abs_error, relative_error, sqnr_db
from mono_quant_fx.ops.linear_module import QuantizedLinearInt4
from mono_quant_fx.ops.native import Kernels, kernels
from mono_quant_fx.pass_base import Pass, PassResult, Pipeline
from mono_quant_fx.pass_change import PassChange
from mono_quant_fx.passes.dequantization import dequantize_model
from mono_quant_fx.pipelines import default_pipeline
from mono_quant_fx.reports.drawing import Drawing, draw, draw_diff
from mono_quant_fx.reports.explaining import explain
from mono_quant_fx.reports.explanation import Chapter, Explanation
from mono_quant_fx.storage.loading import load
from mono_quant_fx.storage.result import QuantizationResult, save
from mono_quant_fx.streaming.quantize_checkpoint import CheckpointReport, quantize_checkpoint
from mono_quant_fx.torch_compile.backend import CompileBackend, compile_backend
from mono_quant_fx.torch_compile.report import CompiledGraph, CompileReport
from mono_quant_fx.version import __version__ as __version__

__all__ = [
    "DEFAULT_INT4_SKIP",
    "AccuracyError",
    "AccuracyRow",
    "AccuracyTable",
    "AccuracyWarning",
    "Bisection",
    "BisectionStep",
    "CalibrationError",
    "CaptureError",
    "Chapter",
    "CheckpointError",
    "CheckpointReport",
    "CompileBackend",
    "CompileReport",
    "CompiledGraph",
    "ConfigError",
    "Drawing",
    "ExperimentalWarning",
    "Explanation",
    "FileFormatError",
    "GraphFormatError",
    "HistogramObserver",
    "InputEnergyObserver",
    "InputError",
    "Kernels",
    "MinMaxObserver",
    "MonoQuantError",
    "MovingAverageMinMaxObserver",
    "NotSelfContainedError",
    "NothingQuantizedError",
    "Observer",
    "Pass",
    "PassChange",
    "PassError",
    "PassResult",
    "PatternError",
    "PercentileObserver",
    "PerformanceWarning",
    "Pipeline",
    "PlanError",
    "PostconditionError",
    "PreconditionError",
    "QuantConfig",
    "QuantScheme",
    "QuantizationInfo",
    "QuantizationResult",
    "QuantizedLinearInt4",
    "QuantizedWeight",
    "Step",
    "Suspect",
    "UnknownNameError",
    "ValidationResult",
    "WeightError",
    "bisect",
    "capture",
    "check_accuracy_warnings",
    "compile_backend",
    "create_observer",
    "default_pipeline",
    "dequantize_model",
    "diff_graphs",
    "draw",
    "draw_diff",
    "explain",
    "export_compressed_tensors",
    "format_graph",
    "history",
    "import_compressed_tensors",
    "kernels",
    "load",
    "max_abs_error",
    "measure_accuracy",
    "passes",
    "quantize",
    "quantize_checkpoint",
    "quantize_weight_int4",
    "relative_error",
    "save",
    "select_observer",
    "sqnr_db",
    "validate_quantization",
]
