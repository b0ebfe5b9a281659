"""Every error that a user's mistake can raise: one family, importable from anywhere (a leaf of the import graph)."""

from __future__ import annotations


class MonoQuantError(Exception):
    """Base of the family: ``except mq.MonoQuantError`` catches whatever this package raises on purpose."""


class ConfigError(MonoQuantError, ValueError):
    """A value in a QuantConfig or QuantScheme breaks a rule; the message names value, rule and way out."""


class PatternError(ConfigError):
    """A skip or override pattern matches nothing in the model; the message lists the nearest names."""


class CaptureError(MonoQuantError):
    """The model could not be turned into an FX graph; the message names the user's line and what to try."""


class WeightError(MonoQuantError, ValueError):
    """A weight cannot be quantized as asked (NaN or infinity, say); the message names it."""


class CheckpointError(MonoQuantError, ValueError):
    """A folder of files cannot be read or written as asked; the message names file, tensor and rule."""


class CalibrationError(MonoQuantError, ValueError):
    """Calibration data is empty, does not fit the model, or fails inside it."""


class InputError(MonoQuantError, ValueError):
    """A quantized graph's input, or a value inside it, holds NaN where INT8 codes are made of it."""


class UnknownNameError(MonoQuantError, LookupError):
    """A graph has no node, module or weight of that name; the message lists the nearest names."""


class NothingQuantizedError(MonoQuantError):
    """Not one weight would be quantized; the message counts the reasons."""


class PassError(MonoQuantError):
    """A pass cannot do its work; the message names pass, node, rule and remedy."""


class PreconditionError(PassError):
    """`requires` found that the graph is not in the stage that the pass expects."""


class PostconditionError(PassError):
    """`ensures` found that the pass broke its promise: a defect of the pass, not of the user."""


class NotSelfContainedError(MonoQuantError):
    """A graph holds something that cannot be written as data; the message names the node, the reason and a remedy."""


class GraphFormatError(MonoQuantError, ValueError):
    """Data that should describe a graph break a rule; the message names the node, the value and the rule."""


class AccuracyError(MonoQuantError):
    """``accuracy_warning="error"`` and a critical finding. `result` holds the finished QuantizationResult."""

    def __init__(self, message: str, result: object = None):
        super().__init__(message)
        self.result = result


class FileFormatError(MonoQuantError):
    """A file is damaged, or cannot hold what it should; the message names file, tensor or place, value and rule."""


class PlanError(MonoQuantError):
    """A file's plan does not fit the model that it is loaded into; the message names the weight and what differs."""


class PerformanceWarning(UserWarning):
    """A slower path than the fastest possible one is taken; the message says why, once."""
