"""dequant-fusion: merges. What dequantizes and the op that reads it become one op, under the name of the latter."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from mono_quant_fx import graph, ops
from mono_quant_fx.checks import choice
from mono_quant_fx.config import COMPUTE
from mono_quant_fx.layer_inputs import conv_window
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


#: Convolutions fuse where input and weight are INT8: op -> how many sizes its window has.
CONVS: dict[Any, int] = {
    op: n for n in (1, 2, 3) for op in (getattr(F, f"conv{n}d"), getattr(aten, f"conv{n}d").default)
}


@dataclass(frozen=True)
class DequantFusion(Pass):
    """Retargets the op's node in place, so that its name and meta stay and the float weight never exists whole.

        x                          dequantize_int4(w)    linear    int4_linear
        x                          dequantize_int8(w)    linear    int8_linear
        dequantize_activation(x)   dequantize_int4(w)    linear    w4a8_linear
        dequantize_activation(x)   dequantize_int8(w)    linear    w8a8_linear
        dequantize_activation(x)   dequantize_int8(w)    conv      w8a8_conv

    What is no such pair (an INT4 convolution, say) keeps its dequantize nodes.

    Args:
        compute: what int4_linear gets: "auto", "float32" or "bfloat16" (see QuantConfig).

    Raises:
        ConfigError: another value of compute.
    """

    name: ClassVar[str] = "dequant-fusion"
    compute: str = "auto"

    def __post_init__(self) -> None:
        choice("compute", self.compute, COMPUTE)

    def rewrite(self, gm: fx.GraphModule) -> None:
        """Every linear that reads a dequantized weight, and every convolution that reads INT8 on both sides."""
        for node in list(gm.graph.nodes):
            if node.op not in ("call_function", "call_method"):
                continue
            if node.target in LINEARS:
                _try_linear(gm, node, LINEARS[node.target], self.compute)
            elif node.target in CONVS:
                _try_conv(node, CONVS[node.target])

    def ensures(self, gm: fx.GraphModule) -> str | None:
        """No F.linear reads a dequantize node any more."""
        for node in gm.graph.nodes:
            if node.target in (F.linear, aten.linear.default) and node.args[1].target is ops.dequantize_int4:
                return f"{node.name} was not fused"
        return None


def _try_linear(gm: fx.GraphModule, node: fx.Node, rule: Linear, compute: str) -> None:
    weight = argument(node, rule.weight)
    if not isinstance(weight, fx.Node):
        return
    source, odd = peel_transposes(weight)
    if source.target in (ops.dequantize_int4, ops.dequantize_int8) and odd is rule.transposed:
        _fuse(node, rule, source, compute)
        _erase_unused(gm, weight)


def _fuse(node: fx.Node, rule: Linear, dequantize: fx.Node, compute: str) -> None:
    x, bias = argument(node, rule.input), argument(node, rule.bias) if rule.bias else None
    if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")) or not isinstance(x, fx.Node):
        return
    if rule.transposed and bias is not None and not _is_row(bias, dequantize):
        return
    is_int4, is_static = dequantize.target is ops.dequantize_int4, x.target is ops.dequantize_activation
    sizes = dequantize.args[3:4] if is_int4 else ()  # the group size; the columns follow from x
    if is_int4 and compute != "auto":
        sizes += (compute,)
    op = (ops.w4a8_linear if is_int4 else ops.w8a8_linear) if is_static else None
    op = op or (ops.int4_linear if is_int4 else ops.int8_linear)
    _retarget(node, op, (*(x.args if is_static else (x,)), *dequantize.args[:3], bias, *sizes))


def _try_conv(node: fx.Node, dims: int) -> None:
    x, view, bias = (argument(node, at) for at in ((0, "input"), (1, "weight"), (2, "bias")))
    window = conv_window(node, dims)
    if x.target is not ops.dequantize_activation or view.target is not aten.view.default or window is None:
        return
    dequantize, shape = view.args
    if dequantize.target is ops.dequantize_int8:
        _retarget(node, ops.w8a8_conv, (*x.args, *dequantize.args, bias, list(shape[2:]), *window))


def _retarget(node: fx.Node, op: Any, args: tuple[Any, ...]) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", op, args, {}


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
