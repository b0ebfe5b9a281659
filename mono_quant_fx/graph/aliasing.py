"""Whose memory a value may lie in, and who minds how it lies there: for passes that move ops or hand out views.

What these tables do not name is taken to need rows in one piece.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from mono_quant_fx.graph.calls import module_of
from mono_quant_fx.graph.effects import may_write, origins
from mono_quant_fx.ops.registry import is_ours

#: Read tensors of any strides, and return memory of their own (or a plain number).
_FRESH_NAMES = (
    "add sub mul div truediv floordiv mod neg pow eq ne lt le gt ge matmul mm bmm addmm baddbmm linear "
    "softmax log_softmax sigmoid tanh relu gelu silu exp log sqrt rsqrt sin cos abs maximum minimum where "
    "cat stack sum mean amax amin layer_norm rms_norm scaled_dot_product_attention clone _to_copy "
    "repeat repeat_interleave size dim numel sym_size sym_numel _assert_tensor_metadata"
)
#: The same, but what they return may be their input's memory. They take any strides, view aside.
_SHARING_NAMES = (
    "transpose permute movedim swapaxes t unsqueeze squeeze expand expand_as slice narrow select getitem chunk split "
    "split_with_sizes unbind unflatten flatten reshape contiguous to float half bfloat16 detach"
)
_FRESH_MODULES = (nn.GELU, nn.LayerNorm, nn.ReLU, nn.RMSNorm, nn.Sigmoid, nn.SiLU, nn.Softmax, nn.Tanh)


def _calls(names: str) -> frozenset[Any]:
    """Every spelling of some ops: torch's and operator's functions, methods (by name) and aten's overloads."""
    found: set[Any] = set(names.split())
    for name in names.split():
        found |= {getattr(home, name) for home in (torch, F, operator) if hasattr(home, name)}
        packet = getattr(torch.ops.aten, name, None)
        overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
        found |= {o for o in overloads if not o._schema.is_mutable}
    return frozenset(found)


_FRESH, _SHARING, _VIEW = _calls(_FRESH_NAMES), _calls(_SHARING_NAMES), _calls("view")
_FIELDS = ("shape", "dtype", "device", "ndim")


def owners(values: Iterable[fx.Node]) -> set[fx.Node | None]:
    """The nodes whose memory these values may share; None is all memory that comes from outside the graph."""
    return {None if n.op in ("placeholder", "get_attr") else n for n in origins(values)}


def takes_split_rows(node: fx.Node, columns: int) -> bool:
    """Whether no reader minds if the rows [..., columns] of a node's value are cut out of longer rows.

    Every reader, also of views of it, has to be one that takes any strides and writes nothing. A view is one of these
    where its sizes show that it only splits the last dimension. The graph's caller may do anything with an output.
    """
    todo, seen = [(node, True)], set[fx.Node]()
    while todo:
        value, is_rows = todo.pop()
        for user in value.users:
            if user in seen or is_ours(user.target) or _is_fresh(user):
                continue
            is_split = is_rows and _is(user, _VIEW) and user.args[0] is value and _keeps_rows(user, columns)
            if not is_split and not _is(user, _SHARING):
                return False
            seen.add(user)
            todo.append((user, is_split))
    return True


def _keeps_rows(view: fx.Node, columns: int) -> bool:
    """Whether some trailing sizes of a view multiply to one row."""
    value, asked = view.meta.get("val"), view.args[1:]
    first = asked[0] if asked else None
    sizes = list(value.shape) if value is not None else list(first if isinstance(first, tuple | list) else asked)
    product = 1
    while sizes and isinstance(sizes[-1], int) and sizes[-1] > 0 and product < columns:
        product *= sizes.pop()
    return product == columns


def _is_fresh(node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module_of(node)) in _FRESH_MODULES and not may_write(node)
    return _is(node, _FRESH) or (node.target is getattr and node.args[1] in _FIELDS)


def _is(node: fx.Node, table: frozenset[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in table and not may_write(node)
