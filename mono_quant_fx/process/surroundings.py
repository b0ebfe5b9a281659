"""What a caller may have switched on around a call, and what no result may depend on.

Autocast, inference mode, gradients switched off, modes that see every torch function or every op, products of float32
in bfloat16, a default device on which the model does not lie: each entry point puts them aside while it works, and back
when it is done, so that it gives the same bits as without. The default dtype stays, because the user's forward may rely
on it; our own tensors say their dtype.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _python_dispatch as dispatch
from torch.utils._device import DeviceContext

P = ParamSpec("P")
T = TypeVar("T")
_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


@contextlib.contextmanager
def plain(*models: Any) -> Iterator[None]:
    """Puts the caller's modes aside. A default device stays where one of the `models` has a tensor on it."""
    modules = [m for m in (getattr(m, "graph_module", m) for m in models) if isinstance(m, nn.Module)]
    kinds = {t.device.type for m in modules for t in (*m.parameters(), *m.buffers())}
    with (
        _no_function_modes(kinds),
        _no_dispatch_modes(),
        _no_autocast(),
        _exact_products,
        torch.inference_mode(False),
        torch.set_grad_enabled(True),
    ):
        yield


class _ExactProducts:
    """Products of float32 in float32, whatever torch.set_float32_matmul_precision allows.

    The switch is the whole process's: the first thread to come puts it aside, and the last to go puts it back. What
    other threads compute in between is only more exact.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, list[tuple[Any, str]]()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                inherited = torch.backends.fp32_precision  # type: ignore[attr-defined]
                found = [(place, place.fp32_precision) for place in _PRODUCTS]
                self.before = [(p, "none" if v == inherited else v) for p, v in found if v not in ("none", "ieee")]
                for place, _ in self.before:
                    place.fp32_precision = "ieee"
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            for place, value in self.before if self.inside == 0 else ():
                place.fp32_precision = value


_PRODUCTS = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
_exact_products = _ExactProducts()


def in_plain_surroundings(work: Callable[P, T]) -> Callable[P, T]:
    """The same function, inside plain(): what it is given decides about the default device."""

    @functools.wraps(work)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with plain(*args, *kwargs.values()):
            return work(*args, **kwargs)

    return inside


@contextlib.contextmanager
def _no_dispatch_modes() -> Iterator[None]:
    """Modes that see every op. Those of an export stand in one place for all threads, and a flag of each thread says
    whether they are its own: another thread's stay where they are.
    """
    if torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch):
        with dispatch._disable_current_modes():
            yield
        return
    modes = [dispatch._pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            dispatch._push_mode(mode)


@contextlib.contextmanager
def _no_function_modes(kinds: set[str]) -> Iterator[None]:
    modes = [_pop_mode() for _ in _get_current_function_mode_stack()][::-1]
    kept = [mode for mode in modes if isinstance(mode, DeviceContext) and mode.device.type in kinds]
    for mode in kept:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in kept:
            _pop_mode()
        for mode in modes:
            _push_mode(mode)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    enabled = [kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]
    for kind in enabled:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in enabled:
            torch.set_autocast_enabled(kind, True)
