"""Copies of a model to trace, the model inside its wrappers, and the hooks that hang on it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mono_quant_fx.errors import CaptureError
from mono_quant_fx.frontend.belongings import GLOBAL_HOOKS
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.copying import copied
from mono_quant_fx.process.this_thread import ThisThread


def twin(model: nn.Module) -> nn.Module:
    """A deep copy that shares every parameter and buffer and compiles nothing; the model itself if it has no copy."""
    try:
        model = copied(model, (t for _, t in tensors.named_tensors(model)))
    except Exception:
        return model
    for module in model.modules():
        vars(module).pop("_compiled_call_impl", None)  # of module.compile()
        if _is_compiled(module):
            object.__setattr__(module, "forward", functools.partial(_call, module._modules["_orig_mod"]))
        if isinstance(module, torch.jit.ScriptModule):  # its tensors are copies, and none can be replaced later
            for parameter in module.parameters():
                parameter.detach_()
    return model


def _call(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch._dynamo")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile, DataParallel and DistributedDataParallel put around it.

    Raises:
        CaptureError: a hook hangs on the wrapper, where the module inside does not have it.
    """
    while _is_compiled(model) or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        names = own_hooks(model)
        if names:
            raise CaptureError(
                f"{type(model).__name__}: the hook {names[0]} hangs on this wrapper and would be lost; register it on "
                "the module inside, or remove it"
            )
        model = model._modules["_orig_mod" if _is_compiled(model) else "module"]  # type: ignore[assignment]
    return model


def own_hooks(model: nn.Module) -> list[str]:
    """The names of the forward hooks and pre-hooks on a module itself, without those that torch put there."""
    hooks = [*vars(model)["_forward_pre_hooks"].values(), *vars(model)["_forward_hooks"].values()]
    return [_name(h) for h in hooks if not str(getattr(h, "__module__", "")).startswith("torch.")]


def global_hooks() -> list[str]:
    """The names of the forward hooks and pre-hooks that torch calls for every module of the process."""
    return [_name(hook) for hooks in GLOBAL_HOOKS for hook in hooks.values()]


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


@contextlib.contextmanager
def without_global_hooks() -> Iterator[None]:
    """Silences them in this thread; a graph holds none, and calls of its modules would run them again."""
    here = ThisThread()

    def silent(hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return None if here else hook(*args, **kwargs)

    before = [dict(hooks) for hooks in GLOBAL_HOOKS]
    for hooks in GLOBAL_HOOKS:
        hooks.update({key: functools.partial(silent, hook) for key, hook in hooks.items()})
    try:
        yield
    finally:
        here.is_active = False
        for hooks, old in zip(GLOBAL_HOOKS, before, strict=True):
            hooks.update({key: hook for key, hook in old.items() if key in hooks})
