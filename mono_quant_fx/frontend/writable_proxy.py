"""A value under symbolic tracing that may be written as a tensor may."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.proxy import TraceError


class WritableProxy(fx.Proxy):
    """``x += y`` and ``x[i] = y`` become calls, as x.add_(y) is one."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "tensor"):
            raise TraceError(f"forward sets .{name} of a tensor, which a graph cannot hold")
        super().__setattr__(name, value)


def _augmented(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def write(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return write


_WRITERS = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift"
for _name in _WRITERS.split():
    setattr(WritableProxy, f"__{_name}__", _augmented(_name))
