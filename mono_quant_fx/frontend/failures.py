"""Why a capture failed, in words: the user's own line that stopped it, the reason, and what to try."""

from __future__ import annotations

import inspect
import linecache
import os
import sysconfig
import traceback
from pathlib import Path

import torch
from torch import nn

_OWN = str(Path(__file__).resolve().parents[1])
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_LAYERS = os.path.join(_TORCH, "nn", "modules", "")
_STDLIB = sysconfig.get_paths()["stdlib"]
_GENERATED = ("<eval_with_key>", "<frozen ", "<string>")


def explain_failure(model: nn.Module, failures: dict[str, BaseException], method: str, has_example: bool) -> str:
    """The message of a CaptureError: one paragraph a way tried, then remedies."""
    lines = [f"cannot capture {type(model).__name__} as a graph (method={method!r})"]
    lines += [f"  {name} stopped at {where(model, e)}\n    {reason(e)}" for name, e in failures.items()]
    return "\n".join([*lines, *(f"  try: {advice}" for advice in _remedies(failures, method, has_example))])


def explain_own_failure(model: nn.Module, example: str, error: BaseException) -> str:
    """The message when the model itself, untraced, fails on the example."""
    return (
        f"{type(model).__name__} itself fails on {example}, before any capture, at {where(model, error)}\n"
        f"    {reason(error)}\n  try: an example on which model(...) runs"
    )


def explain_export(model: nn.Module, failure: BaseException) -> str:
    """Why torch.export did not open the modules that symbolic tracing keeps closed, and what to try, on one line."""
    tries = _remedies({"torch.export": failure}, "auto", True)
    return f"torch.export, which would open it, stopped at {where(model, failure)}: {reason(failure)}; try: {tries[0]}"


def where(model: nn.Module, error: BaseException) -> str:
    """File, line, function and source text: the innermost frame that is the user's, else a torch layer's, else forward.

    A library that the user's model is built from (transformers, say) counts as the user's.
    """
    frames = list(reversed(traceback.extract_tb(error.__traceback__)))
    layers = (f for f in frames if f.filename.startswith(_LAYERS) and not f.filename.endswith("module.py"))
    for frame in [*(f for f in frames if _is_users(f.filename)), *layers]:
        return f"{frame.filename}:{frame.lineno}, in {frame.name}: `{(frame.line or '').strip()}`"
    return _forward_line(model)


def _is_users(file: str) -> bool:
    stdlib = file.startswith(_STDLIB) and "site-packages" not in file
    return not stdlib and not file.startswith((_OWN, _TORCH, *_GENERATED))


def _forward_line(model: nn.Module) -> str:
    forward = inspect.unwrap(type(model).forward)
    try:
        file, (source, first) = inspect.getsourcefile(forward), inspect.getsourcelines(forward)
    except (OSError, TypeError):
        return f"{type(model).__name__}.forward"
    line = first + next((i for i, text in enumerate(source) if text.lstrip().startswith("def ")), 0)
    return f"{file}:{line}, in forward: `{linecache.getline(file or '', line).strip()}`"


def reason(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {text[:400]}"


def _remedies(failures: dict[str, BaseException], method: str, has_example: bool) -> list[str]:
    text = " ".join(str(e) for e in failures.values())
    advice = []
    if method != "symbolic" and not has_example:
        advice.append("pass example_inputs (or calibration_data): torch.export needs one batch to run on")
    if method == "symbolic":
        advice.append('method="auto" with example_inputs, so that torch.export can be tried')
    if "not a known type" in text and "Cache" in text:
        advice.append(
            "the model returns a cache object: set model.config.use_cache = False, or pass use_cache=False in "
            "example_inputs, and quantize the forward that returns tensors"
        )
    elif "not a known type" in text:
        advice.append(
            "return a tuple or a dict of tensors, or make the output's class known with "
            "torch.export.register_dataclass (torch.utils._pytree.register_pytree_node for another container)"
        )
    if any(_looks_for_causality(e) for e in failures.values()):
        advice.append(
            "say by keyword in the example whether the mask is causal (tgt_is_causal=True, or is_causal=True for an "
            "encoder), so that torch does not look at its values"
        )
    if "control flow" in text or "DataDependent" in text or "Could not guard" in text or "symbolically traced" in text:
        advice.append("replace a Python `if` or `while` on tensor values by torch.where or torch.cond")
    advice.append("quantize the submodules that can be captured, one by one, and put the results in their places")
    advice.append(
        "torch.compile(model, backend=mq.compile_backend()): it quantizes, without data, the pieces that Dynamo finds"
    )
    return advice


def _looks_for_causality(error: BaseException) -> bool:
    """Whether torch's own transformer stopped the export where it compares a mask with the causal one."""
    return any(frame.name == "_detect_is_causal_mask" for frame in traceback.extract_tb(error.__traceback__))
