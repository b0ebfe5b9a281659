"""What is known of the types of a graph's values before anything has run: whether a write keeps its target's type."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mono_quant_fx.graph.calls import PLAIN, augmented, call_name
from mono_quant_fx.graph.effect_tables import EITHER, IDENTITIES, PIECES, VIEWS, words
from mono_quant_fx.graph.effects import is_number
from mono_quant_fx.graph.tensors import get_tensor

Types = dict[fx.Node, torch.dtype | None]

#: Give the type that all their tensors have.
_SAME = words(
    "linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm bmm addmm "
    "baddbmm add sub mul div truediv iadd isub imul itruediv add_ sub_ mul_ div_ relu relu_ relu6 gelu silu mish "
    "sigmoid tanh leaky_relu elu selu celu hardswish hardsigmoid hardtanh softplus softmax log_softmax exp sqrt rsqrt "
    "abs neg clamp layer_norm batch_norm group_norm instance_norm rms_norm max_pool1d max_pool2d max_pool3d "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate pad cat "
    "stack mean sum getitem scaled_dot_product_attention clone ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish "
    "Hardswish Hardsigmoid Hardtanh Sigmoid Tanh Softmax Softplus BatchNorm1d BatchNorm2d BatchNorm3d LayerNorm "
    "GroupNorm RMSNorm MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d "
    "AdaptiveAvgPool2d AdaptiveAvgPool3d Identity Dropout Dropout1d Dropout2d Dropout3d Flatten Unflatten Upsample"
) | ((VIEWS | PIECES | IDENTITIES | EITHER) - words("to type type_as float double half bfloat16 int long"))
#: Of these, those that take tensors of one type only, so that one of them tells.
_STRICT = ("linear", "bilinear", "conv", "matmul", "mm", "bmm", "addmm", "baddbmm")
#: Write with the type of what they write, or ask for it.
_KEEPING = tuple(words("copy_ fill_ zero_ index_ scatter masked_ put_ addmm baddbmm addbmm addmv addr"))
#: Give truth values, or doubles.
_CHANGING = words("eq_ ne_ lt_ le_ gt_ ge_ less_ less_equal_ greater_ greater_equal_ not_equal_ float_power_")


def value_types(gm: fx.GraphModule) -> Types:
    """The floating-point type of each value; None where it is another or not known."""
    types: Types = {}
    for node in gm.graph.nodes:
        types[node] = _type_of(gm, node, types)
    return types


def _type_of(gm: fx.GraphModule, node: fx.Node, types: Types) -> torch.dtype | None:
    value = node.meta.get("val") if node.op != "get_attr" else get_tensor(gm, node)
    if isinstance(value, Tensor):
        return value.dtype if value.is_floating_point() else None
    name = call_name(node)
    if node.op == "call_module":
        name = type(gm.get_submodule(str(node.target))).__name__
    known = {types[n] for n in node.all_input_nodes if not is_number(n)} if name in _SAME else set()
    if name.startswith(_STRICT):
        known -= {None}
    return known.pop() if len(known) == 1 else None


def needs_cast(node: fx.Node, target: fx.Node, types: Types) -> bool:
    """Whether the value that a writing node computes may have another type than `target`, which keeps its own."""
    name = call_name(node)
    if node.op == "call_module" or "setitem" in name or name.startswith(_KEEPING):
        return False
    if name in _CHANGING or name.startswith("logical_"):
        return True
    others = [n for n in node.all_input_nodes if n is not target and not is_number(n)]
    if not others or (types.get(target) is not None and all(types.get(n) == types[target] for n in others)):
        return False
    return augmented(node) is None or not _may_be_number(target)


def _may_be_number(node: fx.Node) -> bool:
    """Whether nothing shows that a value is a tensor."""
    if node.op == "placeholder":
        return not isinstance(node.meta.get("val"), Tensor)
    is_plain = getattr(node.target, "__module__", "") in PLAIN
    return is_plain and all(_may_be_number(n) for n in node.all_input_nodes)
