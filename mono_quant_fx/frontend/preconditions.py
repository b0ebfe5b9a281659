"""What can be captured at all: a module with Python code, with shapes, in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen

from mono_quant_fx.errors import CaptureError
from mono_quant_fx.frontend.export import check_exported_mode
from mono_quant_fx.frontend.record import get_record
from mono_quant_fx.frontend.twins import unwrapped
from mono_quant_fx.graph import tensors


def check_model(model: Any) -> nn.Module:
    """The module to capture, out of the wrappers around it.

    Raises:
        CaptureError: it is none, or one without Python code, without shapes, or in training mode; says what to do.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"a torch.nn.Module is needed, not {type(model).__name__}; wrap a function in a Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__}: TorchScript holds no Python code that could be traced; pass the nn.Module that "
            "it was scripted or traced from"
        )
    model = unwrapped(model)
    for name, tensor in tensors.named_tensors(model):
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"{type(model).__name__}: {name!r} has no shape yet, because its module is a lazy one; run the model "
                "on one batch first, model(x), which makes it"
            )
    check_eval(model)
    return model


def check_eval(model: nn.Module) -> None:
    """Raises CaptureError if a module that runs is in training mode; names it."""
    modules = dict(model.named_modules())
    if isinstance(model, fx.GraphModule):  # in an exported graph the mode is an argument, and the flags mean nothing
        exported = isinstance(model.graph._codegen, _PyTreeCodeGen)
        called = [str(n.target) for n in model.graph.nodes if n.op == "call_module" and n.target != "_guards_fn"]
        modules = {n: m for n, m in modules.items() if n in called or (n == "" and not exported)}
        if get_record(model).method == "given":
            check_exported_mode(model)
    for name, module in modules.items():
        if module.training:
            where = f"its module {name!r}" if name else "it"
            raise CaptureError(
                f"{type(model).__name__}: {where} is in training mode; quantization works on a model in eval mode: "
                "call model.eval() first"
            )
