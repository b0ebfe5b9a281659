"""dequantize_model: back to a float graph that runs on the rounded weights, with the weights' own names and shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mono_quant_fx import ops
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import (
    QuantAnnotation,
    annotated,
    drop_annotation,
    get_annotation,
    stored_weight,
)
from mono_quant_fx.graph.codes import restore
from mono_quant_fx.graph.merging import unmerge
from mono_quant_fx.graph.weight_ops import from_matrix
from mono_quant_fx.ops.static_int8 import CONVS
from mono_quant_fx.pass_base import Pass

aten = torch.ops.aten


class _Dequantize(Pass):
    name = "dequantize-model"

    def requires(self, gm: fx.GraphModule) -> str | None:
        lowered = any(a.lowered for _, a in annotated(gm))
        return None if lowered else "the graph holds no quantized weight; give the graph_module of a quantization"

    def rewrite(self, gm: fx.GraphModule) -> None:
        unmerge(gm)
        for node in list(gm.graph.nodes):
            if node.target is ops.dequantize_activation:
                node.replace_all_uses_with(_float_input(node))
        for node, annotation in list(annotated(gm)):
            if annotation.lowered:
                _restore(gm, node, annotation)
            drop_annotation(node)


def dequantize_model(gm: fx.GraphModule) -> fx.GraphModule:
    """The float graph whose weights are dequantize(codes): same outputs within rounding, plain torch ops only.

    INT8 activations become float again as well, which changes the outputs by what their rounding cost. Weights are
    parameters under their original names, in their original shapes and dtypes, so that the state_dict loads into the
    model that was captured. `gm` is not touched.

    Raises:
        PreconditionError: `gm` is no GraphModule or holds nothing quantized.
    """
    return _Dequantize()(tensors.need_graph(gm, "dequantize_model")).graph_module


def _restore(gm: fx.GraphModule, packed: fx.Node, annotation: QuantAnnotation) -> None:
    value = _float_weight(gm, annotation)
    users = list(packed.users)
    tensors.attach(gm, annotation.weight, nn.Parameter(value, requires_grad=False))  # INT8 codes have this very name
    with gm.graph.inserting_before(packed):
        weight = gm.graph.get_attr(annotation.weight)
    weight.meta = {k: v for k, v in packed.meta.items() if get_annotation(packed) is not v}
    for user in users:
        if user.target in (ops.dequantize_int4, ops.dequantize_int8):
            end = _restored(user, annotation)
            end.replace_all_uses_with(weight)
        else:
            _unfuse(gm, user, weight, annotation)


def _float_weight(gm: fx.GraphModule, annotation: QuantAnnotation) -> Tensor:
    whole = restore(stored_weight(gm, annotation), annotation)
    return whole.to(getattr(torch, annotation.dtype)).contiguous()


def _restored(dequantize: fx.Node, annotation: QuantAnnotation) -> fx.Node:
    """The node that holds the weight in its own shape: a few views after the dequantize node."""
    steps = []
    from_matrix(None, annotation.layout, annotation.groups, annotation.shape, lambda op, *args: steps.append(op))
    node = dequantize
    for _ in steps:
        node = next(iter(node.users))
    return node


def _unfuse(gm: fx.GraphModule, node: fx.Node, weight: fx.Node, annotation: QuantAnnotation) -> None:
    is_static = node.target in (ops.w4a8_linear, ops.w8a8_linear, ops.w8a8_conv)
    x, bias = (_float_input(node), node.args[6]) if is_static else (node.args[0], node.args[4])
    value = weight
    if annotation.layout == "columns":
        with gm.graph.inserting_before(node):
            value = gm.graph.call_function(aten.t.default, (weight,))
            value.meta = dict(weight.meta)
    if node.target is ops.w8a8_conv:
        size, *window = node.args[7:]
        node.target, node.args = CONVS[len(size)], (x, value, bias, *window)  # type: ignore[arg-type]
    else:
        node.target, node.args = F.linear, (x, value, bias)


def _float_input(node: fx.Node) -> fx.Node:
    """What the codes that a node reads were made from."""
    return node.all_input_nodes[0].all_input_nodes[0]
