"""The one place where an operator gets its name: torch.library's low-overhead way, for every device at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.autograd import Info, make_autograd_impl  # what torch.library.register_autograd calls

NAMESPACE = "mono_quant_fx"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    cpu: Callable[..., Any] | None = None,
    autocast: tuple[int, ...] = (),
) -> torch._ops.OpOverload:
    """Defines `schema` ("name(Tensor x, ...) -> Tensor") with its reference for all devices; returns the overload.

    `cpu` is the implementation for that device, where it is another. Where autocast is on, it casts the arguments at
    `autocast`, as it does with those of the float op, and stays out of what happens inside.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if cpu is not None:
        _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is not None:
        with_gradient = make_autograd_impl(op, Info(backward, setup_context))
        _LIBRARY.impl(name, _without_detour(with_gradient, cpu or reference), "Autograd", with_keyset=True)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _casting(op, autocast, device.lower()), f"Autocast{device}")
    return op


def _without_detour(with_gradient: Callable[..., Any], cpu: Callable[..., Any]) -> Callable[..., Any]:
    """torch.library.register_autograd's kernel, but for the call that is the most frequent and has the least to do.

    Where nothing wants a gradient and the dispatcher's next stop is the CPU's implementation, it is called at once:
    going back through the dispatcher takes 4 us, as long as the whole product of a small layer.
    """

    known: dict[int, bool] = {}  # a keyset, as a number -> whether the CPU is next

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        keys = keyset.raw_repr()
        if keys not in known:
            known[keys] = (keyset & torch._C._after_autograd_keyset).highestPriorityTypeId() == torch._C.DispatchKey.CPU
        if known[keys] and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return cpu(*arguments)
        return with_gradient(keyset, *arguments)

    return kernel


def _casting(op: torch._ops.OpOverload, at: tuple[int, ...], device: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def call(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(_cast(a, dtype) if i in at else a for i, a in enumerate(arguments)))

    return call


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Autocast leaves float64 alone."""
    is_cast = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_cast else value


def is_ours(target: object) -> bool:
    """Whether a node's target is one of these operators."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE
