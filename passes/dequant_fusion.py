"""dequant-fusion: merges. dequantize and a linear become int4_linear (int8_linear), under the linear's name."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from mono_quant_fx import graph, ops
from mono_quant_fx.pass_base import Pass
from mono_quant_fx.weight_ops import Arg, argument, is_transpose, peel_transposes

aten = torch.ops.aten
_MATMULS = (torch.matmul, torch.mm, operator.matmul, "matmul", "mm", aten.matmul.default, aten.mm.default)


@dataclass(frozen=True)
class Linear:
    """Where a linear op has its input, weight and bias, and whether the weight comes transposed, as [K, N]."""

    input: Arg
    weight: Arg
    bias: Arg | None
    transposed: bool


#: The pairs: (one of ours that dequantizes) x (one of these).
LINEARS: dict[Any, Linear] = {
    **dict.fromkeys((F.linear, aten.linear.default), Linear((0, "input"), (1, "weight"), (2, "bias"), False)),
    **dict.fromkeys((torch.addmm, aten.addmm.default), Linear((1, "mat1"), (2, "mat2"), (0, "input"), True)),
    **dict.fromkeys(_MATMULS, Linear((0, "input"), (1, "other"), None, True)),
}


@dataclass(frozen=True)
class DequantFusion(Pass):
    """Retargets the linear's node in place, so that its name and meta stay and the float weight never exists whole."""

    name: ClassVar[str] = "dequant-fusion"

    def rewrite(self, gm: fx.GraphModule) -> None:
        """Every linear that reads a dequantized weight."""
        for node in list(gm.graph.nodes):
            rule = LINEARS.get(node.target) if node.op in ("call_function", "call_method") else None
            weight = argument(node, rule.weight) if rule is not None else None
            if rule is None or not isinstance(weight, fx.Node):
                continue
            source, odd = peel_transposes(weight)
            if source.target in (ops.dequantize_int4, ops.dequantize_int8) and odd is rule.transposed:
                _fuse(node, rule, source)
                _erase_unused(gm, weight)

    def ensures(self, gm: fx.GraphModule) -> str | None:
        """No F.linear reads a dequantize node any more."""
        for node in gm.graph.nodes:
            if node.target in (F.linear, aten.linear.default) and node.args[1].target is ops.dequantize_int4:
                return f"{node.name} was not fused"
        return None


def _fuse(node: fx.Node, rule: Linear, dequantize: fx.Node) -> None:
    x, bias = argument(node, rule.input), argument(node, rule.bias) if rule.bias else None
    if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")) or not isinstance(x, fx.Node):
        return
    if rule.transposed and bias is not None and not _is_row(bias, dequantize):
        return
    node.op = "call_function"
    if dequantize.target is ops.dequantize_int4:
        packed, scale, zero_point, group_size, _ = dequantize.args
        node.target, node.args = ops.int4_linear, (x, packed, scale, zero_point, bias, group_size)
    else:
        node.target, node.args = ops.int8_linear, (x, *dequantize.args, bias)
    node.kwargs = {}


def _is_row(bias: fx.Node, dequantize: fx.Node) -> bool:
    """Whether what addmm adds is a constant with one value an output channel; it may be any matrix that broadcasts."""
    gm: Any = bias.graph.owning_module
    value, packed = graph.get_tensor(gm, bias), graph.get_tensor(gm, dequantize.all_input_nodes[0])
    return value is not None and packed is not None and value.shape == packed.shape[:1]


def _erase_unused(gm: fx.GraphModule, node: fx.Node) -> None:
    """Erases the chain of transposes (a method call has no schema that dead-code elimination could trust)."""
    while is_transpose(node) and not node.users:
        node, dead = node.all_input_nodes[0], node
        gm.graph.erase_node(dead)
