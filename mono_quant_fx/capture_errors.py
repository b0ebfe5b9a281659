"""Why a capture failed, in words: the user's own line that stopped it, the reason, and what to try."""

from __future__ import annotations

import inspect
import linecache
import os
import traceback

import torch
from torch import nn

_OWN = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


def explain_failure(model: nn.Module, failures: dict[str, BaseException], method: str, has_example: bool) -> str:
    """The message of a CaptureError: one paragraph a way tried, then remedies."""
    lines = [f"cannot capture {type(model).__name__} as a graph (method={method!r})"]
    lines += [f"  {name} stopped {_where(model, e)}\n    {_reason(e)}" for name, e in failures.items()]
    return "\n".join([*lines, *(f"  try: {advice}" for advice in _remedies(failures, method, has_example))])


def _where(model: nn.Module, error: BaseException) -> str:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((_OWN, _TORCH, "<")):
            return f"at {frame.filename}:{frame.lineno}, in {frame.name}: `{(frame.line or '').strip()}`"
    try:
        file = inspect.getsourcefile(type(model).forward) or "?"
        line = inspect.getsourcelines(type(model).forward)[1]
    except (OSError, TypeError):
        return f"in {type(model).__name__}.forward"
    return f"inside torch, called from {file}:{line}: `{linecache.getline(file, line).strip()}`"


def _reason(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {text[:400]}"


def _remedies(failures: dict[str, BaseException], method: str, has_example: bool) -> list[str]:
    text = " ".join(str(e) for e in failures.values())
    advice = []
    if method != "symbolic" and not has_example:
        advice.append("pass example_inputs (or calibration_data), so that torch.export can be tried as well")
    if method == "symbolic":
        advice.append('method="auto" with example_inputs, so that torch.export can be tried')
    if "Cache" in text and "not a known type" in text:
        advice.append(
            "the model returns a cache object: set model.config.use_cache = False, or pass use_cache=False in "
            "example_inputs, and quantize the forward that returns tensors"
        )
    if "control flow" in text or "DataDependent" in text or "Could not guard" in text or "symbolically traced" in text:
        advice.append("replace a Python `if` or `while` on tensor values by torch.where or torch.cond")
    advice.append("quantize the submodules that can be captured, one by one, and put the results in their places")
    return advice
