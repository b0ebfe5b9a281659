"""After fork: threads of OpenMP stay in the parent, and a child that shares work with them waits for ever.

That holds for torch's own operators as well, and for any program that forks after it used more than one thread. So the
first quantized operator in such a child sets torch to one thread, as torch's own DataLoader does in its workers, and
the kernels keep to one from then on.
"""

from __future__ import annotations

import os
import threading
import warnings

import torch

from mono_quant_fx.errors import PerformanceWarning

_TASKS = "/proc/self/task"


class _State:
    """Of this process: whether a fork lost threads, whether torch still has to hear of it, what is there to lose."""

    lost = False
    is_pending = False
    at_fork = False


_state = _State()


def threads() -> int:
    """How many threads a kernel may use: torch's number, and 1 in a process that lost some."""
    return 1 if _state.lost else torch.get_num_threads()


def settle() -> None:
    """Called by every operator before it computes; in a child that lost threads the first call sets torch to one."""
    if not _state.is_pending:
        return
    _state.is_pending = False
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "this process was forked after its parent had used several threads, which OpenMP does not survive: "
            "torch is set to one thread here (start processes by 'spawn' or 'forkserver' to use more)",
            PerformanceWarning,
            stacklevel=2,
        )


def _before() -> None:
    _state.at_fork = _has_threads_of_others()


def _in_child() -> None:
    _state.lost = _state.lost or _state.at_fork
    _state.is_pending = _state.lost


def _has_threads_of_others() -> bool:
    """Whether threads run that Python did not start; where that is not told, yes."""
    ours = sum(not isinstance(t, threading._DummyThread) for t in threading.enumerate())
    try:
        return len(os.listdir(_TASKS)) > ours
    except OSError:
        return True


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_before, after_in_child=_in_child)
