"""The one place where an operator gets its name: torch.library's low-overhead way, for every device at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "mono_quant_fx"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    cpu: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Defines `schema` ("name(Tensor x, ...) -> Tensor") with its reference for all devices; returns the overload.

    `cpu` is the implementation for that device, where it is another.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if cpu is not None:
        _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def is_ours(target: object) -> bool:
    """Whether a node's target is one of these operators."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE
