"""Where an op that consumes a weight has its bias, and how one that has none gets one."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx

from mono_quant_fx.graph.arguments import Arg, argument, set_argument
from mono_quant_fx.graph.free_names import free_name
from mono_quant_fx.graph.rewrite import add_constant
from mono_quant_fx.graph.weight_table import rows_for, unpermuted


def bias_at(node: fx.Node) -> Arg | None:
    """The place and name of an op's bias; None for an op that takes none."""
    for row in rows_for(node):
        weight = unpermuted(argument(node, row.weight))
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            return row.bias
    return None


def bias_name(gm: fx.GraphModule, weight: str, module: str, reserved: Collection[str] = ()) -> str:
    """a.weight -> a.bias, a.w -> a.w_bias; a number follows where that is taken."""
    return free_name(gm, f"{module}.bias" if module and weight.endswith(".weight") else f"{weight}_bias", reserved)


def add_bias(gm: fx.GraphModule, node: fx.Node, weight: fx.Node, at: Arg, name: str, value: Tensor) -> None:
    """Stores a bias under a name, reads it next to the op's weight, and gives it to the op, which has none."""
    with gm.graph.inserting_after(weight):
        constant = add_constant(gm, name, value, node)
    set_argument(node, at, constant)
