"""linear-merging: merges side by side. Linears that read one input become one op and a split of its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import fx

from mono_quant_fx.graph.aliasing import owners, takes_split_rows
from mono_quant_fx.graph.annotation import get_annotation, part_names
from mono_quant_fx.graph.effects import may_write
from mono_quant_fx.graph.merging import LinearCall, merge
from mono_quant_fx.graph.tensors import get_tensor, is_persistent
from mono_quant_fx.pass_base import Pass


@dataclass(frozen=True)
class LinearMerging(Pass):
    """The projections q, k and v of an attention, or gate and up of an MLP, as one product of stacked rows.

    int4_linear, int8_linear, w4a8_linear and w8a8_linear merge with their like: same input, same group size, dtypes and
    compute, all with zero points or none, all with a bias or none. What stays apart: a weight, scale or bias that
    something else reads as well, and ops between which the input may be written into.

    The results are views of one tensor, its columns, where no reader minds (see aliasing.takes_split_rows), and copies
    elsewhere. For few rows merging pays, for many it hardly matters (docs/kernels.md), so there is no other rule. The
    last bits may change where torch's matmul computes the product, or another way than before.
    """

    name: ClassVar[str] = "linear-merging"

    def rewrite(self, gm: fx.GraphModule) -> None:
        """Group by group."""
        reserved = part_names(gm)
        for nodes in _groups(gm):
            calls = [call for node in nodes if (call := LinearCall.read(node)) is not None]
            views = all(takes_split_rows(n, c.outputs(gm)) for n, c in zip(nodes, calls, strict=True))
            merge(gm, nodes, not views, reserved)

    def ensures(self, gm: fx.GraphModule) -> str | None:
        """Nothing is left to merge."""
        left = _groups(gm)
        return f"{left[0][0].name} and {left[0][1].name} were not merged" if left else None


class _Kind(NamedTuple):
    """Equal for ops that may merge."""

    op: Any
    input: fx.Node
    qparams: tuple[fx.Node, ...]
    options: tuple[Any, ...]
    is_symmetric: bool
    constants: tuple[Any, ...]


def _groups(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The ops that may be computed together, where the first of them stands."""
    done: list[list[fx.Node]] = []
    growing: dict[_Kind, list[fx.Node]] = {}
    reading: dict[fx.Node | None, set[_Kind]] = {}
    for node in gm.graph.nodes:
        for owner in owners(may_write(node)):
            for ended in reading.pop(owner, set()):
                if ended in growing:
                    done.append(growing.pop(ended))
        kind = _kind(gm, node)
        if kind is not None:
            if kind not in growing:
                for owner in owners((kind.input,)):
                    reading.setdefault(owner, set()).add(kind)
            growing.setdefault(kind, []).append(node)
    found = [nodes for nodes in (*done, *growing.values()) if len(nodes) > 1]
    return sorted(found, key=lambda nodes: nodes[0])  # by their places in the graph


def _kind(gm: fx.GraphModule, node: fx.Node) -> _Kind | None:
    """None for what never merges."""
    call = LinearCall.read(node)
    if call is None:
        return None
    own = [n for n in (*call.stored, call.bias) if n is not None]
    tensors = [get_tensor(gm, n) for n in own]
    if any(t is None for t in tensors) or any(len(n.users) > 1 for n in own):
        return None
    if get_annotation(own[0]) is None or not all(is_persistent(gm, str(n.target)) for n in own):
        return None
    like = tuple((type(t), t.dtype, t.device, t.requires_grad) for t in tensors if t is not None)
    return _Kind(node.target, call.input[0], call.input[1:], call.options, call.stored[2] is None, like)
