"""Where an op that consumes a weight has its bias, and how one that has none gets one."""

from __future__ import annotations

from torch import Tensor, fx

from mono_quant_fx import graph
from mono_quant_fx.rewrite import add_constant
from mono_quant_fx.weight_ops import WEIGHT_OPS, Arg, argument, peel_transposes


def bias_at(node: fx.Node) -> Arg | None:
    """The place and name of an op's bias; None for an op that takes none."""
    for op in WEIGHT_OPS.get(node.target, ()):
        weight = argument(node, op.weight)
        if isinstance(weight, fx.Node) and peel_transposes(weight)[0].op == "get_attr":
            return op.bias
    return None


def bias_name(gm: fx.GraphModule, weight: str, module: str) -> str:
    """a.weight -> a.bias, a.w -> a.w_bias; a number follows where that is taken."""
    return graph.free_name(gm, f"{module}.bias" if module and weight.endswith(".weight") else f"{weight}_bias")


def add_bias(gm: fx.GraphModule, node: fx.Node, weight: fx.Node, at: Arg, name: str, value: Tensor) -> None:
    """Stores a bias under a name, reads it next to the op's weight, and gives it to the op, which has none."""
    with gm.graph.inserting_after(weight):
        constant = add_constant(gm, name, value, node)
    if at[0] < len(node.args):
        node.update_arg(at[0], constant)
    else:
        node.update_kwarg(at[1], constant)
