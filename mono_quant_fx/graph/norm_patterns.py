"""Normalizations that a model writes out by hand, found in the graph by what they compute.

    x * rsqrt(mean(x^2) + eps) * w              RMSNorm, as language models have it
    (x - mean(x)) / sqrt(var(x) + eps) * w + b  LayerNorm

Casts, reshapes and factors may stand between; the statistic may be a mean, a variance, a sum or a norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import fx

from mono_quant_fx.graph.tensors import op_name

#: How many calls in a row are looked through.
REACH = 12

_CASTS = {"to", "_to_copy", "float", "half", "bfloat16", "double", "type", "type_as", "clone", "contiguous", "detach"}
_SHAPES = {"view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "getitem", "slice"}
_PRODUCTS = {"mul", "multiply", "div", "divide", "truediv", "true_divide"}
_SUMS = {"add", "sub", "subtract", "rsub"}
_POWERS = {"rsqrt", "sqrt", "pow", "square", "reciprocal", "clamp", "clamp_min", "maximum", "max"}
_STATISTICS = {
    "mean", "var", "std", "sum", "norm", "vector_norm", "linalg_vector_norm", "linalg_norm", "var_mean", "std_mean"
}  # fmt: skip
_NORMALIZED = {"normalize"}


def is_vector(shape: Sequence[int]) -> bool:
    """Whether at most one axis is longer than 1: a scale or a shift, not a matrix."""
    return max(shape, default=1) == math.prod(shape)


def is_elementwise(node: fx.Node) -> bool:
    """Whether a node is a product, a quotient, a sum or a difference."""
    return base_name(node) in _PRODUCTS | _SUMS


def norm_kind(user: fx.Node, weight: fx.Node) -> str:
    """ "RMSNorm" or "LayerNorm" where `user` is on the way of the vector `weight` into one, else ""."""
    for product, operand in _products(user, weight):
        for other in product.all_input_nodes:
            kind = "" if other is operand else _kind(other)
            if kind:
                return kind
    return ""


def _products(user: fx.Node, weight: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(product or sum, its operand) where the weight, perhaps cast, reshaped or shifted by a number, meets a value."""
    todo = [(user, weight, REACH)]
    while todo:
        node, operand, left = todo.pop()
        name = base_name(node)
        if name in _PRODUCTS | _SUMS and len(node.all_input_nodes) == 2:
            yield node, operand
        elif left and (name in _CASTS | _SHAPES | _SUMS) and len(node.all_input_nodes) == 1:
            todo += [(reader, node, left - 1) for reader in node.users]


def _kind(value: fx.Node) -> str:
    """The norm that a value is the result of, before its weight or after."""
    for _ in range(REACH):
        name, inputs = base_name(value), value.all_input_nodes
        if name in _NORMALIZED:
            return "RMSNorm"
        if name in _PRODUCTS and len(inputs) == 2:
            x, found = next(((a, b) for a, b in (inputs, inputs[::-1]) if _is_statistic(b)), (value, None))
            if found is not None:
                return "LayerNorm" if base_name(_uncast(x)) in _SUMS else "RMSNorm"
            value = next((a for a in inputs if a.op not in ("get_attr", "placeholder")), inputs[0])
        elif name in _CASTS | _PRODUCTS and inputs:
            value = inputs[0]
        else:
            return ""
    return ""


def _uncast(value: fx.Node) -> fx.Node:
    while base_name(value) in _CASTS and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return value


def _is_statistic(value: fx.Node) -> bool:
    """Whether a value is a root, a power or the like of a mean, a variance, a sum or a norm."""
    for _ in range(REACH):
        name = base_name(value)
        if name in _STATISTICS:
            return True
        if name not in _POWERS | _SUMS | _PRODUCTS | _CASTS | _SHAPES or not value.all_input_nodes:
            return False
        value = value.all_input_nodes[0]
    return False


def base_name(node: fx.Node) -> str:
    """A call's op without its home and overload: aten.mul.Tensor, operator.mul and .mul are mul."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return op_name(node).removeprefix("aten.").removeprefix(".").split(".")[0].strip("_")
