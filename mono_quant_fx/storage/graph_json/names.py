"""Names in a stored graph. torch.fx turns a graph into Python source, so each has to be one that it can write there."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from mono_quant_fx.graph.own_names import is_taken, spoken
from mono_quant_fx.storage.graph_json.values import need

#: Modules inside modules.
_DEEPEST = 100
#: Names that the code of a graph uses for something else.
RESERVED = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "getattr", "slice"})


def check_path(path: Any, what: str) -> str:
    """A dotted path whose parts torch.fx can write as attributes, and that no attribute of a module stands in.

    Raises:
        GraphFormatError: it is none.
    """
    parts = path.split(".") if isinstance(path, str) else [""]
    need(
        len(parts) <= _DEEPEST and all(map(spoken, parts)),
        what,
        path,
        "it is a dotted path of names without quotation marks",
    )
    taken = [p for i, p in enumerate(parts) if is_taken(p, at_root=not i)]
    need(not taken, what, path, f"{taken[0] if taken else ''} is an attribute that every module has")
    return str(path)


def above(path: str, known: Container[str]) -> str:
    """The path of `known` that a path lies in; "" for none."""
    parts = path.split(".")
    return next((p for i in range(1, len(parts)) if (p := ".".join(parts[:i])) in known), "")


def targets_of(records: list[Any]) -> list[Any]:
    """What get_attr and call_module nodes read, in order; no path is a part of another one's that is a tensor."""
    found = [r.get("target") for r in records if isinstance(r, dict) and r.get("op") in ("get_attr", "call_module")]
    strange = [t for t in found if not isinstance(t, str)]
    need(not strange, "a node's target", strange[:1], "a dotted path is needed")
    return list(dict.fromkeys(found))
