"""The one table: which call consumes a weight, at which argument, and which of its axes is the output channel.

A weight is a constant of the graph. Where it stands decides how it is viewed as a matrix [N, K]:

    rows             [out, in, ...]          linear, conv, embedding        -> flatten(1)
    columns          [in, out]               addmm, x @ w                   -> t()
    transposed_conv  [in, out/groups, ...]   conv_transpose                 -> channel axis to the front, flatten

A constant that is transposed before its use (x @ w.t()) is looked through, and changes between rows and columns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mono_quant_fx.graph import get_attribute, get_tensor, module_path, module_stack, op_name
from mono_quant_fx.ops.registry import is_ours

aten = torch.ops.aten
Arg = tuple[int, str]


@dataclass(frozen=True)
class WeightOp:
    """One way of consuming a weight; layout None means that the op is known and left alone."""

    layer_type: str
    weight: Arg = (1, "weight")
    bias: Arg | None = (2, "bias")
    input: Arg = (0, "input")
    layout: str | None = "rows"
    groups: Arg = (6, "groups")


def _table() -> dict[Any, tuple[WeightOp, ...]]:
    linear = WeightOp("Linear")
    addmm = WeightOp("Linear", weight=(2, "mat2"), bias=(0, "input"), input=(1, "mat1"), layout="columns")
    right = WeightOp("Linear", weight=(1, "other"), bias=None, layout="columns")
    left = WeightOp("Linear", weight=(0, "input"), bias=None, input=(1, "other"), layout="rows")
    weight_first = partial(WeightOp, weight=(0, "weight"), bias=None, input=(1, "indices"))
    table: dict[Any, tuple[WeightOp, ...]] = {
        F.linear: (linear,),
        aten.linear.default: (linear,),
        F.bilinear: (WeightOp("Bilinear", weight=(2, "weight"), bias=(3, "bias")),),
        aten.bilinear.default: (WeightOp("Bilinear", weight=(2, "weight"), bias=(3, "bias")),),
        torch.addmm: (addmm,),
        aten.addmm.default: (addmm,),
        F.embedding: (WeightOp("Embedding", bias=None),),
        aten.embedding.default: (weight_first("Embedding"),),
        F.embedding_bag: (WeightOp("EmbeddingBag", bias=None),),
        aten.embedding_bag.default: (weight_first("EmbeddingBag"),),
        aten.embedding_bag.padding_idx: (weight_first("EmbeddingBag"),),
    }
    for matmul in (
        torch.matmul,
        torch.mm,
        operator.matmul,
        "matmul",
        "mm",
        aten.matmul.default,
        aten.mm.default,
    ):
        table[matmul] = (right, left)
    for n in (1, 2, 3):
        conv = WeightOp(f"Conv{n}d")
        for target in (
            getattr(F, f"conv{n}d"),
            getattr(aten, f"conv{n}d").default,
            getattr(aten, f"conv{n}d").padding,
        ):
            table[target] = (conv,)
        transposed = WeightOp(f"ConvTranspose{n}d", layout="transposed_conv")
        packet = getattr(aten, f"conv_transpose{n}d")
        table[getattr(F, f"conv_transpose{n}d")] = (transposed,)
        table[packet.default if n == 1 else packet.input] = (transposed,)
    table[aten.convolution.default] = (WeightOp("Conv", groups=(8, "groups")),)
    norms: list[tuple[str, int, tuple[Any, ...]]] = [
        ("LayerNorm", 2, (F.layer_norm, aten.layer_norm.default)),
        ("RMSNorm", 2, (F.rms_norm, aten.rms_norm.default)),
        ("GroupNorm", 2, (F.group_norm, aten.group_norm.default)),
        ("BatchNorm2d", 3, (F.batch_norm,)),
        ("BatchNorm2d", 1, (aten.batch_norm.default,)),
        ("InstanceNorm2d", 3, (F.instance_norm,)),
        ("InstanceNorm2d", 1, (aten.instance_norm.default,)),
    ]
    for name, at, targets in norms:
        for target in targets:
            table[target] = (WeightOp(name, weight=(at, "weight"), bias=(at + 1, "bias"), layout=None),)
    return table


WEIGHT_OPS = _table()

#: Module classes whose forward is one call of the table; symbolic capture looks inside them.
WEIGHT_MODULES = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

_TRANSPOSES = (
    torch.t, torch.transpose, torch.permute, "t", "transpose", "permute",
    aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default,
)  # fmt: skip


@dataclass(frozen=True)
class WeightUse:
    """One consumer of a weight. layout is None where it cannot be lowered, and then reason says why."""

    node: fx.Node
    layer_type: str
    layout: str | None
    reason: str = ""
    groups: int = 1
    input: fx.Node | None = None

    @property
    def op(self) -> str:
        """The consumer's operation, for people."""
        return op_name(self.node)


@dataclass(frozen=True)
class Weight:
    """A float constant of the graph and everything that consumes it; `name` is its fully qualified name."""

    node: fx.Node
    name: str
    tensor: Tensor
    uses: tuple[WeightUse, ...]

    def module_of(self, use: WeightUse) -> str:
        """The module to name in a table: the one that owns the weight if it made the use, else the one that did."""
        return module_path(use.node) or self.name.rpartition(".")[0]

    def names_of(self, use: WeightUse) -> tuple[str, ...]:
        """Every name that a pattern may call this use by."""
        owner = self.name.rpartition(".")[0]
        return tuple(dict.fromkeys(n for n in (self.module_of(use), owner, self.name) if n))

    def types_of(self, use: WeightUse) -> set[str]:
        """The class names around this use, and the layer type that its op stands for."""
        return {use.layer_type, *(name for _, name in module_stack(use.node))}


def find_weights(gm: fx.GraphModule) -> list[Weight]:
    """Every float weight, in execution order: parameters (biases aside) and constants in a weight's place."""
    weights = []
    for node in gm.graph.nodes:
        tensor = get_tensor(gm, node)
        if tensor is None or not tensor.is_floating_point() or any(is_ours(u.target) for u in node.users):
            continue
        uses = tuple(sorted(_uses(node, node, tensor, False), key=lambda use: use.node))
        if uses and (isinstance(tensor, nn.Parameter) or any(use.layout for use in uses)):
            weights.append(Weight(node, str(node.target), tensor, uses))
    return weights


def hidden_weights(gm: fx.GraphModule) -> list[tuple[fx.Node, nn.Module]]:
    """The call_module nodes whose modules hold parameters that the graph does not show."""
    calls = ((n, get_attribute(gm, n.target)) for n in gm.graph.nodes if n.op == "call_module")
    return [(n, module) for n, module in calls if any(True for _ in module.parameters())]


def to_matrix(weight: Tensor, layout: str, groups: int) -> Tensor:
    """The weight as [N, K], output channels first: a view where its strides allow one."""
    if layout == "columns":
        return weight.t()
    if layout == "transposed_conv":
        per_group = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # [groups, out/groups, in/groups, ...]
        return per_group.reshape(groups * weight.shape[1], -1)
    return weight.flatten(1)


def from_matrix(matrix: Any, layout: str, groups: int, shape: tuple[int, ...], call: Callable[..., Any]) -> Any:
    """The inverse of to_matrix, as calls of aten ops through `call(op, *args)`, so that it can build nodes as well."""
    if layout == "columns":
        return call(aten.t.default, matrix)
    if layout == "transposed_conv":
        split = [groups, shape[1], shape[0] // groups, *shape[2:]]
        swapped = call(aten.transpose.int, call(aten.view.default, matrix, split), 1, 2)
        return call(aten.reshape.default, swapped, list(shape))
    return matrix if len(shape) == 2 else call(aten.view.default, matrix, list(shape))


def matrix_shape(shape: tuple[int, ...], layout: str, groups: int) -> tuple[int, int]:
    """(N, K) of a weight of that shape."""
    numel = 1
    for size in shape:
        numel *= size
    rows = shape[1] * groups if layout == "transposed_conv" else shape[1 if layout == "columns" else 0]
    return rows, numel // rows if rows else 0


def peel_transposes(node: fx.Node) -> tuple[fx.Node, bool]:
    """(source, whether an odd number of 2-D transposes lies between source and node)."""
    odd = False
    while is_transpose(node):
        node, odd = node.all_input_nodes[0], not odd
    return node, odd


def is_transpose(node: fx.Node) -> bool:
    """Whether a node swaps the two axes of a matrix."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("T", "mT")
    if node.op not in ("call_function", "call_method") or node.target not in _TRANSPOSES:
        return False
    axes = node.args[1] if len(node.args) == 2 else node.args[1:]
    return {a % 2 for a in axes if isinstance(a, int)} == {0, 1} if axes else True  # type: ignore[union-attr]


def is_assertion(node: fx.Node) -> bool:
    """Whether a node only asserts a tensor's dtype and device, as torch.export notes them: no use of a weight."""
    return node.target is aten._assert_tensor_metadata.default


def argument(node: fx.Node, at: Arg) -> Any:
    """A call's argument by place or keyword."""
    return node.args[at[0]] if at[0] < len(node.args) else node.kwargs.get(at[1])


def _uses(source: fx.Node, node: fx.Node, tensor: Tensor, transposed: bool) -> Iterator[WeightUse]:
    for user in node.users:
        if tensor.dim() == 2 and is_transpose(user):
            yield from _uses(source, user, tensor, not transposed)
        elif user.op != "output" and not is_assertion(user):
            use = _classify(user, node, tensor, transposed)
            if use is not None:
                yield use


def _classify(user: fx.Node, weight: fx.Node, tensor: Tensor, transposed: bool) -> WeightUse | None:
    """How `user` consumes `weight`; None when only as a bias."""
    rules = WEIGHT_OPS.get(user.target, ()) if user.op in ("call_function", "call_method") else ()
    for op in rules:
        if argument(user, op.weight) is weight:
            return _rule(user, op, tensor, transposed)
    if any(op.bias and argument(user, op.bias) is weight for op in rules) or (rules and rules[0].layout is None):
        return None
    return WeightUse(user, op_name(user), None, f"{op_name(user)} is no op that takes a quantized weight")


def _rule(user: fx.Node, op: WeightOp, tensor: Tensor, transposed: bool) -> WeightUse:
    layer_type, layout, groups = op.layer_type, op.layout, 1
    if user.target is aten.convolution.default:
        layer_type = f"Conv{'Transpose' if user.args[6] else ''}{tensor.dim() - 2}d"
        layout = "transposed_conv" if user.args[6] else layout
    if layout == "transposed_conv":
        groups = argument(user, op.groups) or 1
    if transposed and layout is not None:
        layout = {"rows": "columns", "columns": "rows"}[layout]
    source = argument(user, op.input)
    use = WeightUse(user, layer_type, layout, "", groups, source if isinstance(source, fx.Node) else None)
    if layout is None:
        return replace(use, reason=f"{layer_type} is a normalization")
    if tensor.dim() < 2 or (layer_type == "Linear" and tensor.dim() != 2):
        return replace(use, layout=None, reason=f"a {tensor.dim()}-D constant in {op_name(user)} has no rows to group")
    if use.input is None:
        return replace(use, layout=None, reason=f"{op_name(user)} of two constants")
    return use
