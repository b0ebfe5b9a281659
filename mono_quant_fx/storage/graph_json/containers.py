"""The containers of a graph's inputs and outputs (torch's pytree specs) as JSON data and back.

A leaf is "*"; tuples and lists are {"tuple": [...]} and {"list": [...]}; dicts, which keep their order, are
{"dict": [[key, ...], ...]} and {"ordered": [...]} for an OrderedDict. No other container is known here.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch.utils import _pytree as pytree

from mono_quant_fx.errors import NotSelfContainedError
from mono_quant_fx.storage.graph_json.values import MAX_DEPTH, need, show

LEAF = "*"
_KINDS: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "ordered": OrderedDict}
_NAMES = {kind: name for name, kind in _KINDS.items()}


class _Leaf:
    """Stands for a tensor while a spec is spelled out as the containers that it describes."""


def tree_to_json(spec: pytree.TreeSpec, what: str) -> Any:
    """A spec as JSON data.

    Raises:
        NotSelfContainedError: a container is a class of its own (a ModelOutput, a namedtuple).
    """
    foreign: type | None = _foreign(spec)
    if foreign is not None:
        raise NotSelfContainedError(
            f"the {what} container {foreign.__module__}.{foreign.__qualname__} keeps the graph from being "
            "self-contained: reading it back would need that class; wrap the model in a Module whose forward takes and "
            "returns tensors, tuples, lists and dicts only (for a Hugging Face model: `return model(...).to_tuple()`)"
        )
    return _to_json(pytree.tree_unflatten([_Leaf() for _ in range(spec.num_leaves)], spec), 0)


def _foreign(spec: pytree.TreeSpec) -> type | None:
    """The first container class that is not among the plain ones, outermost first."""
    if spec.is_leaf():
        return None
    if spec.type not in _NAMES:
        return spec.type  # type: ignore[return-value]
    found = (_foreign(spec.child(i)) for i in range(spec.num_children))
    return next((kind for kind in found if kind is not None), None)


def _to_json(tree: Any, depth: int) -> Any:
    if isinstance(tree, _Leaf):
        return LEAF
    if depth > MAX_DEPTH:
        raise NotSelfContainedError(f"inputs or outputs are nested more than {MAX_DEPTH} deep")
    if not isinstance(tree, dict):
        return {_NAMES[type(tree)]: [_to_json(v, depth + 1) for v in tree]}
    strange = [k for k in tree if type(k) not in (str, int)]
    if strange:
        raise NotSelfContainedError(
            f"an input or output dict has the key {show(strange[0])}; only str and int can be kept"
        )
    return {_NAMES[type(tree)]: [[k, _to_json(v, depth + 1)] for k, v in tree.items()]}


def tree_from_json(data: Any) -> pytree.TreeSpec:
    """The inverse of tree_to_json.

    Raises:
        GraphFormatError: the data are none of its forms.
    """
    return pytree.tree_structure(_from_json(data, 0))


def _from_json(data: Any, depth: int) -> Any:
    if data == LEAF:
        return _Leaf()
    need(depth <= MAX_DEPTH, "a container", data, f"it is nested more than {MAX_DEPTH} deep")
    need(
        isinstance(data, dict) and len(data) == 1, "a container", data, f'"{LEAF}" or an object with one key is needed'
    )
    kind, inner = next(iter(data.items()))
    need(kind in _KINDS, "a container's kind", kind, f"it is one of {', '.join(_KINDS)}")
    need(isinstance(inner, list), f"the content of a {kind}", inner, "a list is needed")
    if kind in ("tuple", "list"):
        return _KINDS[kind](_from_json(v, depth + 1) for v in inner)
    for pair in inner:
        pairs = isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)
        need(pairs, f"an item of a {kind}", pair, "it is a list of a string or integer and a container")
    need(len({k for k, _ in inner}) == len(inner), f"a {kind}", inner, "no key stands twice")
    return _KINDS[kind]((k, _from_json(v, depth + 1)) for k, v in inner)
