"""Whether a captured graph computes what the model does: both run on the example."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx import graph
from mono_quant_fx.capture_errors import explain_own_failure
from mono_quant_fx.data import Batch, leaves
from mono_quant_fx.errors import CaptureError
from mono_quant_fx.randomness import own_generators


def expectation(model: nn.Module, example: Batch) -> list[Any] | None:
    """What the model gives on the example, as leaves; None where it has tensors without values.

    Raises:
        CaptureError: the model itself fails on the example.
    """
    if any(t.is_meta for _, t in graph.named_tensors(model)):
        return None
    try:
        return _outputs(_running_twin(model), lambda m: m(*example.args, **example.kwargs))
    except Exception as e:
        raise CaptureError(explain_own_failure(model, example.label, e)) from e


def check_faithful(gm: fx.GraphModule, example: Batch, expected: list[Any]) -> None:
    """Raises CaptureError if the graph gives something else on the example than `expected`."""
    actual = _outputs(_running_twin(gm), functools.partial(_interpret, values=example.bind(gm)))
    if len(actual) != len(expected) or not all(map(_same, expected, actual)):
        raise CaptureError("the traced graph computes something else than the model: Python control flow was frozen")


def _interpret(gm: nn.Module, values: list[Any]) -> Any:
    assert isinstance(gm, fx.GraphModule)
    interpreter = fx.Interpreter(gm)
    interpreter.extra_traceback = False
    return interpreter.run(*values, enable_io_processing=False)


def _running_twin(model: nn.Module) -> nn.Module:
    """A copy whose buffers may be written, where the model can be copied."""
    try:
        return graph.isolate(model)
    except Exception:
        return model


def _outputs(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[Any]:
    """The leaves of an output, under the random numbers that every run gets."""
    with torch.no_grad(), own_generators():
        return leaves(run(model))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and (not isinstance(a, int | float | str) or a == b)
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
