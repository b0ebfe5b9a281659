"""Which frames Dynamo leaves to Python. It tells no backend of them, so the end of each compilation is listened to."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any


@dataclass(frozen=True)
class Fallback:
    """A function that Dynamo gave up on, so that what it computes itself runs in Python, on float weights.

    Attributes:
        function: its qualified name.
        place: file and line where Dynamo stopped.
        reason: Dynamo's, in a line.
    """

    function: str
    place: str
    reason: str

    def __str__(self) -> str:
        return f"Dynamo left {self.function} to Python at {self.place}: {self.reason}"


def listen(backend: Any, heard: Callable[[Any, Fallback], None]) -> Callable[[Any], None]:
    """Calls heard(backend, fallback) for each frame given up on that was to be compiled by `backend`, while it lives.

    Returns what Dynamo calls, to be passed to ensure_listening after a torch.compiler.reset(), which forgets it.
    """
    owner = weakref.ref(backend)

    def ended(_: Any) -> None:  # called under a lock of Dynamo's and in its `finally`: nothing may be raised here
        with contextlib.suppress(Exception):
            alive = owner()
            found = None if alive is None else _given_up(alive)
            if found is not None:
                heard(alive, found)

    ensure_listening(ended)
    return ended


def ensure_listening(ended: Callable[[Any], None]) -> None:
    """Registers what listen returned, where it is not."""
    import torch._dynamo  # costs a second, and whoever makes a backend pays it anyway

    handler = getattr(torch._dynamo, "callback_handler", None)
    if handler is not None and ended not in handler.end_callbacks:
        handler.register_end_callback(ended)


def limits_hit(frames: dict[str, str]) -> list[Fallback]:
    """The frames, of those in `frames` (Dynamo's number -> qualified name), that it compiles no more variants of."""
    from torch._dynamo.utils import get_compilation_metrics

    hit = {}
    for event in get_compilation_metrics():
        number = str(event.compile_id or "").partition("/")[0]
        if number in frames and "recompile limit exceeded" in (event.fail_reason or ""):
            hit[number] = Fallback(frames[number], "its recompile limit", "further sizes and values run in float")
    return list(hit.values())


def current_frame() -> tuple[str, str] | None:
    """(Dynamo's number, qualified name) of the frame that is being compiled; None outside of a compilation."""
    found = _compilation()
    return None if found is None else (str(found["compile_id"]).partition("/")[0], _name(found["code"]))


def _given_up(backend: Any) -> Fallback | None:
    """The frame whose compilation for `backend` just ended with an error that Dynamo does not pass on."""
    import torch._dynamo as dynamo

    error = sys.exc_info()[1]
    compilation = _compilation()
    if error is None or compilation is None or _innermost(compilation["compiler_fn"]) is not backend:
        return None
    is_kept_quiet = isinstance(error, dynamo.exc.Unsupported) or dynamo.config.suppress_errors
    if compilation.get("one_graph") or not is_kept_quiet:
        return None
    code = compilation["code"]
    stack = getattr(error, "real_stack", None)
    file, line = (stack[-1].filename, stack[-1].lineno) if stack else (code.co_filename, code.co_firstlineno)
    return Fallback(_name(code), f"{file}:{line}", _reason(error))


def _compilation() -> dict[str, Any] | None:
    """The variables of the innermost torch._dynamo.convert_frame._compile that is running."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_compile" and {"compiler_fn", "compile_id", "code"} <= frame.f_locals.keys():
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _innermost(backend: Any) -> Any:
    """What torch.compile was given, below the wrappers that it puts around."""
    while (inner := getattr(backend, "_torchdynamo_orig_backend", getattr(backend, "compiler_fn", None))) is not None:
        backend = inner
    return backend


def _name(code: CodeType) -> str:
    return str(getattr(code, "co_qualname", code.co_name))


def _reason(error: BaseException) -> str:
    """Dynamo's headline, and its explanation where there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    explained = next((line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")), "")
    return ": ".join(filter(None, (lines[0] if lines else type(error).__name__, explained))).rstrip(".")
