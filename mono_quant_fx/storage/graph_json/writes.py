"""Writes into a view, as a stored graph has them: the module that makes them, by the name of the view."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload

from mono_quant_fx.errors import NotSelfContainedError
from mono_quant_fx.functionalization.pure_writes import Method, Through
from mono_quant_fx.storage.graph_json.calls import function_name, function_of
from mono_quant_fx.storage.graph_json.values import fields, need

#: Views that stay within their tensor and keep its type: `view` may take bytes for another one.
_WORDS = "diagonal expand imag narrow permute real select slice transpose unflatten unfold unsqueeze"
VIEWS = frozenset(_WORDS.split())


def through_to_json(module: Through) -> dict[str, Any]:
    """A module of functionalization/views.py as data.

    Raises:
        NotSelfContainedError: it writes into a view that load would refuse.
    """
    view = module.view
    name = view.name if isinstance(view, Method) else function_name(view)
    kind = "method" if isinstance(view, Method) else "function"
    if name is None or _plain(view, name) not in VIEWS:
        raise NotSelfContainedError(
            f"it writes into a view made by {name or view!r}, which a stored graph may not; write into slices instead"
        )
    return {"through": {kind: name}}


def through_from_json(data: Any) -> Through:
    """The module that through_to_json wrote.

    Raises:
        GraphFormatError: it names no view, or one that does not stay within its tensor.
    """
    given = fields(fields(data, "it", "through")["through"], "a write", "", "method function")
    need(len(given) == 1, "a write", data, "it names one method or function")
    kind, name = next(iter(given.items()))
    need(isinstance(name, str), "a view", name, "it is a name")
    view = Method(name) if kind == "method" else function_of(name)
    need(_plain(view, name) in VIEWS, "a view", name, f"it is one of {', '.join(sorted(VIEWS))}")
    return Through(view)


def _plain(view: Any, name: str) -> str:
    """aten.unfold.default and torch.diagonal without what stands around the name."""
    return name.split(".")[1] if isinstance(view, OpOverload) else name.rpartition(".")[2]
