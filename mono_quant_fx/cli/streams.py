"""Standard output and error as the caller left them: closed, full, or a pipe that nobody reads any more."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def open_closed_streams() -> None:
    """Gives a stream that was closed before the start to the null device.

    Python has None for it then, and its number would go to the next file that is opened: what torch's own code writes
    to number 1 or 2 would land in the user's file.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            _to_null(number, only_if_free=True)
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def _to_null(number: int, only_if_free: bool = False) -> None:
    if only_if_free:
        with suppress(OSError):
            os.fstat(number)
            return
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def say(text: str) -> None:
    """A line on standard error, where it can be written: what a command returns says the same."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def flush_streams() -> None:
    """Writes out what is left, or drops it: Python would complain on its way out, and exit with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                _to_null(stream.fileno())
