"""What a call does to memory: which arguments it writes, or may write, and whose memory its result may be.

One rule for all spellings (aten overloads, torch's functions, methods, modules). Schemas say it for operators, names
and flags for the rest of torch (a last underscore, inplace=, out=). What neither tells may write into every tensor it
is given, and may return any of them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from mono_quant_fx.graph.calls import (
    PLAIN,
    HigherOrder,
    augmented,
    bodies,
    bound,
    call_name,
    first_argument,
    flag,
    is_body,
    is_flagged,
    is_torchs,
    is_unknown,
    module_of,
    nodes_in,
    schemas,
)
from mono_quant_fx.graph.effect_tables import (
    EITHER,
    EITHER_MODULES,
    HARMLESS,
    IDENTITIES,
    IDENTITY_MODULES,
    NUMBERS,
    ONE_TENSOR,
    PIECES,
    RESHAPERS,
    TUPLES,
    VIEWS,
)


class Write(NamedTuple):
    """An argument that a call writes; is_certain is False where it may do so."""

    node: fx.Node
    is_certain: bool


def writes(node: fx.Node) -> list[Write]:
    """The values that a node writes, or may write, itself; a body's writes count as its call's."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    sure = [Write(a, True) for a in dict.fromkeys(_sure_writes(node)) if not is_number(a)]
    if sure or not is_unknown(node):
        return sure
    return [Write(a, False) for a in node.all_input_nodes if not is_number(a) and not is_body(a)]


def may_write(node: fx.Node) -> list[fx.Node]:
    """The same without the distinction."""
    return [write.node for write in writes(node)]


def is_number(node: fx.Node) -> bool:
    """Whether a node's value certainly is a size or another plain number, which nobody can write."""
    if "val" in node.meta:
        return isinstance(node.meta["val"], int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)
    if node.op not in ("call_function", "call_method"):
        return False
    name = call_name(node)
    if name in NUMBERS:
        return True
    is_plain = getattr(node.target, "__module__", "") in PLAIN
    return is_plain and bool(node.all_input_nodes) and all(is_number(a) for a in node.all_input_nodes)


def is_same(node: fx.Node) -> bool:
    """Whether a call's result certainly is its first argument itself."""
    if node.op == "call_module":
        module = module_of(node)
        return isinstance(module, IDENTITY_MODULES) and not (module.training and not isinstance(module, nn.Identity))
    return call_name(node) in IDENTITIES and not is_trained(node)


def is_view(node: fx.Node) -> bool:
    """Whether a call's result certainly is a view of its first argument, or a tuple of views."""
    if node.target is operator.getitem:
        return _looks(node.args[1])
    if node.target is getattr and call_name(node) not in VIEWS:
        return False
    return node.op in ("call_function", "call_method") and call_name(node) in VIEWS | PIECES


def is_pieces(node: fx.Node) -> bool:
    """Whether a node's value is a tuple of views."""
    return node.op in ("call_function", "call_method") and call_name(node) in PIECES


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value certainly is one tensor."""
    if "val" in node.meta or node.op == "get_attr":
        return node.op == "get_attr" or isinstance(node.meta["val"], torch.Tensor)
    if node.op == "placeholder" or isinstance(node.target, HigherOrder) or is_unknown(node):
        return False
    if node.op == "call_module":
        return isinstance(module_of(node), ONE_TENSOR)
    name = call_name(node)
    if node.target is operator.getitem:
        first: Any = node.args[0]
        return is_tensor(first) or is_pieces(first)
    is_plain = getattr(node.target, "__module__", "") in PLAIN
    if is_plain:
        return any(map(is_tensor, node.all_input_nodes)) and node.target is not getattr
    return name not in PIECES | TUPLES


def shared(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory a call's result may be."""
    if node.op in ("placeholder", "get_attr") or is_number(node):
        return []
    if node.op == "output" or isinstance(node.target, HigherOrder) or bodies(node) or is_unknown(node):
        return [a for a in node.all_input_nodes if not is_number(a) and not is_body(a)]
    first = first_argument(node)
    if node.op == "call_module" and isinstance(module_of(node), (*IDENTITY_MODULES, *EITHER_MODULES)):
        return node.all_input_nodes[:1]
    name = call_name(node)
    if node.target is operator.getitem and _copies(node.args[1]):
        return []
    if node.target is operator.getitem or name in VIEWS | PIECES | IDENTITIES | EITHER | RESHAPERS:
        every = name in ("einsum", "broadcast_tensors", "meshgrid", "cartesian_prod", "atleast_1d", "atleast_2d")
        return node.all_input_nodes if every or not isinstance(first, fx.Node) else [first]
    return _returned(node) if schemas(node.target) else list(dict.fromkeys(_given_back(node)))


def origins(values: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node whose memory these values may be: themselves, and what they may share it with."""
    todo, seen = list(values), set[fx.Node]()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += shared(node)
    return seen


def written_inputs(gm: fx.GraphModule) -> set[fx.Node]:
    """The placeholders whose memory some node writes or may write."""
    touched = [a for node in gm.graph.nodes for a in may_write(node)]
    return {n for n in origins(touched) if n.op == "placeholder"}


def _looks(index: Any) -> bool:
    """Whether an index takes a view: one of numbers and slices does, one of tensors, lists and truth values copies."""
    parts = index if isinstance(index, tuple) else (index,)
    nodes = nodes_in(index)
    plain = all(isinstance(p, int | slice | str | fx.Node) or p is None or p is ... for p in parts)
    return plain and all(map(is_number, nodes)) and not any(isinstance(p, bool) for p in parts)


def _copies(index: Any) -> bool:
    """Whether an index certainly makes a copy."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, bool | list | torch.Tensor) for p in parts)


def is_trained(node: fx.Node) -> bool:
    """Whether a dropout is, or may be, in training mode."""
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(bound(node).get("train", True))
    value = flag(node, "training", True) if node.op == "call_function" else False
    return value is not False


def _returned(node: fx.Node) -> list[fx.Node]:
    """What an operator's schema says that it returns or looks at."""
    found = schemas(node.target)
    returned = {s for schema in found for r in schema.returns if r.alias_info for s in r.alias_info.before_set}
    arguments = {a.name: a.alias_info.before_set for schema in found for a in schema.arguments if a.alias_info}
    values = [v for name, v in (bound(node) if found else {}).items() if returned & set(arguments.get(name, ()))]
    return [v for value in values for v in nodes_in(value)]


def _sure_writes(node: fx.Node) -> list[fx.Node]:
    if schemas(node.target):
        return _written_by_schema(node)
    if isinstance(node.target, HigherOrder) or bodies(node):
        return _written_in_bodies(node)
    inside = getattr(module_of(node), "written", None) if node.op == "call_module" else None
    if inside is not None:  # of a call on copies: see pure_writes.OnCopies
        return [node.all_input_nodes[i] for i in inside]
    is_item = node.target is operator.setitem or (node.op == "call_method" and node.target == "__setitem__")
    return nodes_in(first_argument(node))[:1] if is_item else [*_given_back(node), *_written_by_layers(node)]


def _given_back(node: fx.Node) -> list[fx.Node]:
    """What a call of torch's without a schema writes and gives back: relu_(x), inplace=True, x += y, out=x."""
    first = nodes_in(first_argument(node))[:1]
    if node.op == "call_module":
        module = module_of(node)
        return first if is_torchs(type(module)) and getattr(module, "inplace", False) is True else []
    found = nodes_in(node.kwargs.get("out"))
    if not isinstance(node.target, str) and not is_torchs(node.target):
        return found
    name = call_name(node)
    is_in_place = name.endswith("_") and not name.endswith("__") and name not in RESHAPERS | HARMLESS
    is_asked = node.op == "call_function" and is_flagged(node)
    return found + first if is_in_place or is_asked or augmented(node) is not None else found


def _written_by_schema(node: fx.Node) -> list[fx.Node]:
    if call_name(node) in RESHAPERS:
        return []
    arguments = [a for schema in schemas(node.target) for a in schema.arguments if a.alias_info is not None]
    marked = {a.name for a in arguments if a.alias_info.is_write}
    values = bound(node)
    if node.target is torch.ops.aten.batch_norm.default and values.get("training") is True:
        marked |= {"running_mean", "running_var"}
    if node.target is torch.ops.aten.instance_norm.default and values.get("use_input_stats") is True:
        marked |= {"running_mean", "running_var"}
    return [n for name in marked for n in nodes_in(values.get(name))]


def _written_in_bodies(node: fx.Node) -> list[fx.Node]:
    found = []
    for body, values in bodies(node):
        written = written_inputs(body)
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        found += [v for p, v in zip(placeholders, values, strict=False) if p in written and isinstance(v, fx.Node)]
    return found


def _written_by_layers(node: fx.Node) -> list[fx.Node]:
    """Lookups with a max_norm renormalize their weight; norms in training mode write their running statistics."""
    if node.target in (F.embedding, F.embedding_bag) and flag(node, "max_norm", None) is not None:
        return nodes_in(flag(node, "weight", None))
    trained = {F.batch_norm: "training", F.instance_norm: "use_input_stats"}.get(node.target)  # type: ignore[arg-type]
    if trained is None or flag(node, trained, F.instance_norm is node.target) is False:
        return []
    return nodes_in([flag(node, "running_mean", None), flag(node, "running_var", None)])
