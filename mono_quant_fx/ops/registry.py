"""The one place where an operator gets its name: torch.library's low-overhead way, for every device at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mono_quant_fx.ops.derivative import Derivative, differentiated, vectorized

NAMESPACE = "mono_quant_fx"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    derivatives: dict[int, Derivative] | None = None,
    leading: bool = False,
    autocast: tuple[int, ...] = (),
    autocast_result: bool = False,
) -> torch._ops.OpOverload:
    """Defines `schema` ("name(Tensor x, ...) -> Tensor") with its reference for all devices; returns the overload.

    `cpu` is the implementation for that device, where it is another. `derivatives` are by the places of arguments (see
    derivative.py), `leading` says that x may have any leading dimensions. Where autocast is on, it casts the arguments
    at `autocast`, as it does with those of the float op, and stays out of what happens inside; `autocast_result` casts
    what comes out, for ops whose float op would give autocast's type but whose input are codes.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if cpu is not None:
        _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    _LIBRARY.impl(name, differentiated(op, cpu or reference, derivatives), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", vectorized(op, leading), lib=_LIBRARY)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _casting(op, autocast, autocast_result, device.lower()), f"Autocast{device}")
    return op


def _casting(op: torch._ops.OpOverload, at: tuple[int, ...], result: bool, device: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def call(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            out = op(*(_cast(a, dtype) if i in at else a for i, a in enumerate(arguments)))
            return _cast(out, dtype) if result else out

    return call


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Autocast leaves float64 alone."""
    is_cast = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_cast else value


def is_ours(target: object) -> bool:
    """Whether a node's target is one of these operators."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE
