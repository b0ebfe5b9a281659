"""What holds in one thread only: a flag, and warnings that are not told, where Python's filters are everyone's."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

#: Where warnings about torch's own workings come from, as opposed to those about the model.
_INTERNAL = re.compile(
    r"torch\.(fx|export|_export|_dynamo|_inductor|_functorch|_subclasses|_higher_order_ops|_library|_guards|_ops|utils"
    r"|_logging|_refs|_prims|_decomp|_meta_registrations)\b|mono_quant_fx\.|(copy|contextlib)$"
)


class ThisThread:
    """True in the thread that made it, as long as it is active. It stands where others expect a bool."""

    def __init__(self) -> None:
        self.thread, self.is_active = threading.get_ident(), True

    def __bool__(self) -> bool:
        return self.is_active and threading.get_ident() == self.thread

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    __ror__, __rand__, __hash__ = __or__, __and__, object.__hash__


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Ignores what this thread is warned of."""
    here = ThisThread()
    try:
        with _filtered(("ignore", _Any(here), Warning, None, 0)):
            yield
    finally:
        here.is_active = False


@contextlib.contextmanager
def told_once(here: ThisThread) -> Iterator[None]:
    """Lets the warnings of the user's model pass, each once, and ignores those of torch about its own workings."""
    with (
        _filtered(("ignore", _Again(here), Warning, None, 0)),
        _filtered(("ignore", None, Warning, _Internal(here), 0)),
    ):
        yield


@contextlib.contextmanager
def _filtered(ours: Any) -> Iterator[None]:
    """One more filter at the head; another thread's catch_warnings may put another list in the place of this one."""
    filters: Any = warnings.filters
    filters.insert(0, ours)
    try:
        yield
    finally:
        now: Any = warnings.filters
        for found in (filters, now):
            with contextlib.suppress(ValueError):
                found.remove(ours)


class _Any:
    """In place of a filter's pattern of texts: every text, in this thread."""

    def __init__(self, here: ThisThread):
        self.here = here

    def match(self, text: str) -> bool:
        return bool(self.here)


class _Internal(_Any):
    """In place of its pattern of module names: what torch says about itself."""

    def match(self, text: str) -> bool:
        return bool(self.here) and _INTERNAL.match(text) is not None


class _Again(_Any):
    """What was said before: a model runs several times while it is captured."""

    def __init__(self, here: ThisThread):
        super().__init__(here)
        self.said: set[str] = set()

    def match(self, text: str) -> bool:
        if not self.here or text in self.said:
            return bool(self.here)
        self.said.add(text)
        return False
