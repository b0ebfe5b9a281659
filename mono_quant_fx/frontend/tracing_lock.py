"""One tracing at a time, which other threads do not feel.

torch.fx and torch.export change the process while they trace: nn.Module.__call__ and __getattr__, a flag, loggers,
what they print, what they warn of. One lock lets one thread at a time do so, and all that can be is made to act in that
thread alone, by asking which thread is running. Nothing is redirected, and the warnings filters of the user stay.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx._symbolic_trace as torch_trace

from mono_quant_fx.process.this_thread import ThisThread, told_once

_LOCK = threading.RLock()
_DEPTH = [0]
_LOGGERS = ("torch.fx.experimental", "torch.export", "torch._export", "torch._subclasses", "torch._dynamo")


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Holds the lock, and keeps what torch.fx does meanwhile to this thread; may be nested."""
    with _LOCK:
        _DEPTH[0] += 1
        try:
            with _in_this_thread() if _DEPTH[0] == 1 else contextlib.nullcontext():
                yield
        finally:
            _DEPTH[0] -= 1


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """tracing(), and what torch.export does besides: flags that models ask for, notes on a failing export."""
    import torch.export._trace as torch_export  # takes two seconds, and symbolic tracing does without

    here = ThisThread()
    flags = functools.partial(_compiling, here)
    with (
        tracing(),
        _silent_loggers(here),
        _patched(torch_export, "print", _printing(here)),
        _patched(torch_export, "_compiling_state_context", flags),
    ):
        try:
            yield
        finally:
            here.is_active = False


@contextlib.contextmanager
def _in_this_thread() -> Iterator[None]:
    here = ThisThread()
    make_graph = vars(torch_trace)["Graph"]

    def flagged(*args: Any, **kwargs: Any) -> Any:
        torch_trace._is_fx_tracing_flag = here  # type: ignore[assignment]  # Tracer.trace sets it, and puts it back
        return make_graph(*args, **kwargs)

    patcher = functools.partial(_ThreadPatcher, here)
    with _patched(torch_trace, "_Patcher", patcher), _patched(torch_trace, "Graph", flagged), told_once(here):
        try:
            yield
        finally:
            here.is_active = False


@contextlib.contextmanager
def _compiling(here: ThisThread) -> Iterator[None]:
    with _patched(torch.compiler, "_is_compiling_flag", here), _patched(torch.compiler, "_is_exporting_flag", here):
        yield


class _ThreadPatcher(torch_trace._Patcher):
    """torch.fx's patches of nn.Module, which leave every other thread what was there before."""

    def __init__(self, here: ThisThread):
        super().__init__()
        self.here = here

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        original, here = getattr(cls, name), self.here

        @functools.wraps(new_fn)
        def method(*args: Any, **kwargs: Any) -> Any:
            return (new_fn if here else original)(*args, **kwargs)

        super().patch_method(cls, name, method, deduplicate)


@contextlib.contextmanager
def _patched(home: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = vars(home).get(name, missing)
    setattr(home, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(home, name)
        else:
            setattr(home, name, before)


def _printing(here: ThisThread) -> Callable[..., None]:
    """torch.export prints the part of a graph that it has when it fails; CaptureError tells what matters."""

    def silent(*args: Any, **kwargs: Any) -> None:
        if not here:
            builtins.print(*args, **kwargs)

    return silent


@contextlib.contextmanager
def _silent_loggers(here: ThisThread) -> Iterator[None]:
    """Drops this thread's notes of torch's loggers, by name, where they would be written."""

    def wanted(record: logging.LogRecord) -> bool:
        return not (here and record.name.startswith(_LOGGERS))

    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch")]
    loggers = [logging.root, *map(logging.getLogger, names)]
    handlers = {id(h): h for log in loggers for h in log.handlers}
    filtered: list[Any] = [*loggers, *handlers.values()]
    for one in filtered:
        one.addFilter(wanted)
    try:
        yield
    finally:
        for one in filtered:
            one.removeFilter(wanted)
