"""A budget for work that calls into torch all the time, and a line that says so when it takes long."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: Seconds after which a line on a terminal tells what takes so long.
QUIET_SECONDS = 10.0


class OverBudgetError(Exception):
    """The work took longer than it may; it never leaves the package."""


class Stopwatch(TorchFunctionMode):
    """Looks at the clock whenever torch is called, in the thread that calls it, where an exception does no harm.

    Args:
        label: what the line on stderr calls the work.
        budget: seconds of this thread's processor time, which other work on the machine does not use up; None is no
            limit.

    Raises:
        OverBudgetError: in the call that comes too late.
    """

    def __init__(self, label: str, budget: float | None = None):
        super().__init__()
        self.label, self.budget = label, budget
        self.began, self.worked, self.shown = time.monotonic(), time.thread_time(), 0.0
        self.screen = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None

    @property
    def spent(self) -> float:
        """Seconds of processor time so far."""
        return time.thread_time() - self.worked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_dynamo_compiling():  # a branch of torch.cond, in which there is no time
            return func(*args, **(kwargs or {}))
        if self.budget is not None and self.spent > self.budget:
            raise OverBudgetError(f"{self.label} takes more than {self.budget:g} s")
        self._show()
        return func(*args, **(kwargs or {}))

    def _show(self) -> None:
        passed = time.monotonic() - self.began
        if self.screen is not None and passed > QUIET_SECONDS and passed > self.shown + 1.0:
            limit = "" if self.budget is None else f", at most {self.budget:g} s"
            line = f"{self.label}: {passed:.0f} s{limit}"
            self.screen.write(f"\r{line[:110]:<110}")
            self.screen.flush()
            self.shown = passed

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        super().__exit__(kind, e, tb)
        if self.screen is not None and self.shown:
            self.screen.write("\n")
