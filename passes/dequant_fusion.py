"""dequant-fusion: merges. What dequantizes and the op that reads it become one op, under the name of the latter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from mono_quant_fx import ops
from mono_quant_fx.checks import choice
from mono_quant_fx.config import OPERATOR_COMPUTE
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.arguments import argument
from mono_quant_fx.graph.permutations import Axes, composed, is_permutation, permutation, permuted
from mono_quant_fx.graph.weight_table import MATMULS, WeightOp, rows_for, unpermuted
from mono_quant_fx.graph.windows import read_window
from mono_quant_fx.pass_base import Pass

aten = torch.ops.aten

#: The ops that fuse with what dequantizes their weight, where its rows are their output channels.
LINEARS = frozenset((F.linear, aten.linear.default, torch.addmm, "addmm", aten.addmm.default, *MATMULS))


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
        choice("compute", self.compute, OPERATOR_COMPUTE)

    def rewrite(self, gm: fx.GraphModule) -> None:
        """Every linear that reads a dequantized weight, and every convolution that reads INT8 on both sides."""
        for node in list(gm.graph.nodes):
            fusion = _fusion(node, self.compute)
            if fusion is not None:
                read = argument(node, fusion.row.weight)
                node.op, node.target, node.args, node.kwargs = "call_function", fusion.op, fusion.args, {}
                _erase_unused(gm, read)

    def ensures(self, gm: fx.GraphModule) -> str | None:
        """Nothing is left to fuse."""
        left = next((node for node in gm.graph.nodes if _fusion(node, self.compute) is not None), None)
        return None if left is None else f"{left.name} was not fused"


@dataclass(frozen=True)
class _Fusion:
    """What a node becomes."""

    row: WeightOp
    op: Any
    args: tuple[Any, ...]


def _fusion(node: fx.Node, compute: str) -> _Fusion | None:
    """The fused op for a linear or a convolution that reads a dequantized weight; None for what is no such pair."""
    for row in rows_for(node):
        weight = argument(node, row.weight)
        source = unpermuted(weight)
        if isinstance(source, fx.Node) and row.inputs == "last" and node.target in LINEARS:
            if (
                source.target in _DEQUANTIZE
                and not source.kwargs
                and _is_transposed(weight) is (row.layout == "columns")
            ):
                return _linear(node, row, source, compute)
        elif isinstance(weight, fx.Node) and row.inputs == "patches" and row.layout == "rows":
            return _conv(node, row, weight)
    return None


_DEQUANTIZE = (ops.dequantize_int4, ops.dequantize_int8)


def _is_transposed(weight: fx.Node) -> bool:
    """Whether the axes of a matrix are swapped on the way to `weight`, an even number of times aside."""
    axes: Axes = (0, 1)
    while (then := permutation(weight, 2)) is not None:
        weight, axes = permuted(weight), composed(then, axes)
    return axes == (1, 0)


def _linear(node: fx.Node, row: WeightOp, dequantize: fx.Node, compute: str) -> _Fusion | None:
    x, bias = argument(node, row.input), argument(node, row.bias) if row.bias else None
    if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")) or not isinstance(x, fx.Node):
        return None
    if row.layout == "columns" and bias is not None and not _is_row(bias, dequantize):
        return None
    is_int4, is_static = dequantize.target is ops.dequantize_int4, x.target is ops.dequantize_activation
    sizes = dequantize.args[3:4] if is_int4 else ()  # the group size; the columns follow from x
    if is_int4 and compute != "auto":
        sizes += (compute,)
    op = (ops.w4a8_linear if is_int4 else ops.w8a8_linear) if is_static else None
    op = op or (ops.int4_linear if is_int4 else ops.int8_linear)
    return _Fusion(row, op, (*(x.args if is_static else (x,)), *dequantize.args[:3], bias, *sizes))


def _conv(node: fx.Node, row: WeightOp, view: fx.Node) -> _Fusion | None:
    x, bias = argument(node, row.input), argument(node, (2, "bias"))
    if view.target is not aten.view.default or getattr(x, "target", None) is not ops.dequantize_activation:
        return None
    dequantize, shape = view.args
    window = read_window(node, tuple(shape[2:]))  # type: ignore[arg-type, index]
    if window is None or window.padding is None or getattr(dequantize, "target", None) is not ops.dequantize_int8:
        return None
    sizes = (list(shape[2:]), list(window.stride), window.padding, list(window.dilation), window.groups)  # type: ignore[arg-type, index]
    return _Fusion(row, ops.w8a8_conv, (*x.args, *dequantize.args, bias, *sizes))  # type: ignore[union-attr]


def _is_row(bias: fx.Node, dequantize: fx.Node) -> bool:
    """Whether what addmm adds is a constant with one value an output channel; it may be any matrix that broadcasts."""
    gm: Any = bias.graph.owning_module
    value, packed = tensors.get_tensor(gm, bias), tensors.get_tensor(gm, dequantize.all_input_nodes[0])
    return value is not None and packed is not None and value.shape == packed.shape[:1]


def _erase_unused(gm: fx.GraphModule, node: fx.Node) -> None:
    """Erases a chain of permutations (a method call has no schema that dead-code elimination could trust)."""
    while is_permutation(node) and not node.users:
        node, dead = permuted(node), node
        gm.graph.erase_node(dead)
