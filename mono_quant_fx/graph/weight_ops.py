"""Where a graph's weights are, what consumes each of them, and how each is viewed as a matrix (see weight_table.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx.graph.arguments import argument
from mono_quant_fx.graph.calls import inside
from mono_quant_fx.graph.effects import may_write
from mono_quant_fx.graph.norm_patterns import is_elementwise, is_vector, norm_kind
from mono_quant_fx.graph.own_names import own_name
from mono_quant_fx.graph.permutations import Axes, composed, permutation
from mono_quant_fx.graph.tensors import get_attribute, get_tensor, module_path, module_stack, op_name
from mono_quant_fx.graph.weight_table import GENERAL_CONVS, WeightOp, rows_for, unpermuted
from mono_quant_fx.ops.registry import is_ours

aten = torch.ops.aten


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
        return module_path(use.node) or self.own_name.rpartition(".")[0]

    @property
    def own_name(self) -> str:
        """The user's own name of it, where the graph cannot have that."""
        return own_name(self.node.graph.owning_module, self.name)

    def names_of(self, use: WeightUse) -> tuple[str, ...]:
        """Every name that a pattern may call this use by."""
        owners = [name.rpartition(".")[0] for name in (self.own_name, self.name)]
        return tuple(dict.fromkeys(n for n in (self.module_of(use), *owners, self.own_name, self.name) if n))

    def types_of(self, use: WeightUse) -> set[str]:
        """The class names around this use, and the layer type that its op stands for."""
        return {use.layer_type, *(name for _, name in module_stack(use.node))}


def find_weights(gm: fx.GraphModule) -> list[Weight]:
    """Every weight, in execution order: parameters (biases aside) and constants in a weight's place.

    Complex ones are among them, and no use of theirs has a layout: codes stand for real numbers.
    """
    weights = []
    for node in gm.graph.nodes:
        tensor = get_tensor(gm, node)
        is_number = tensor is not None and (tensor.is_floating_point() or tensor.is_complex())
        if tensor is None or not is_number or any(is_ours(u.target) for u in node.users):
            continue
        found = sorted(_uses(node, tensor, tuple(range(tensor.dim()))), key=lambda use: use.node)
        uses = tuple(found) if any(use.layer_type != BIAS for use in found) else ()
        if uses and (isinstance(tensor, nn.Parameter) or any(use.layout for use in uses)):
            complex_ = f"its values are {str(tensor.dtype)[6:]}, and codes stand for real numbers"
            uses = tuple(replace(use, layout=None, reason=complex_) for use in uses) if tensor.is_complex() else uses
            weights.append(Weight(node, str(node.target), tensor, uses))
    return weights


def hidden_weights(gm: fx.GraphModule) -> list[tuple[fx.Node, nn.Module]]:
    """The nodes of modules, called or handed to a higher-order call, that hold parameters which no node shows."""
    places = ((n, get_attribute(gm, str(n.target))) for n in gm.graph.nodes if n.op in ("call_module", "get_attr"))
    return [(n, m) for n, m in places if isinstance(m, nn.Module) and any(True for _ in m.parameters())]


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


def is_assertion(node: fx.Node) -> bool:
    """Whether a node only asserts a tensor's dtype and device, as torch.export notes them: no use of a weight."""
    return node.target is aten._assert_tensor_metadata.default


def _uses(node: fx.Node, tensor: Tensor, axes: Axes) -> Iterator[WeightUse]:
    """The consumers of `node`, which is the weight with its axes in the order `axes`."""
    for user in node.users:
        then = permutation(user, tensor.dim())
        if then is not None:
            yield from _uses(user, tensor, composed(axes, then))
        elif user.op != "output" and not is_assertion(user):
            yield _classify(user, node, tensor, axes)


#: The layer type of a use that only adds the constant.
BIAS = "bias"


def _classify(user: fx.Node, weight: fx.Node, tensor: Tensor, axes: Axes) -> WeightUse:
    """How `user` consumes `weight`."""
    name, rows = op_name(user), rows_for(user)
    row = next((row for row in rows if argument(user, row.weight) is weight), None)
    if row is not None:
        use = _rule(user, row, tensor, axes)
        return replace(use, layout=None, reason=f"{name} writes in place here") if may_write(user) else use
    if any(row.bias and argument(user, row.bias) is weight for row in rows) or (rows and rows[0].layout is None):
        return WeightUse(user, BIAS, None, f"{name} reads it as its bias")
    if inside(user):
        return WeightUse(user, name, None, inside(user))
    kind = norm_kind(user, weight) if is_vector(tensor.shape) else ""
    if kind:
        return WeightUse(user, kind, None, f"{kind} is a normalization")
    if is_vector(tensor.shape) and is_elementwise(user):
        return WeightUse(user, name, None, f"a {tensor.dim()}-D constant in {name} has no rows to group")
    return WeightUse(user, name, None, f"{name} is no op that takes a quantized weight")


def _rule(user: fx.Node, row: WeightOp, tensor: Tensor, axes: Axes) -> WeightUse:
    layer_type, layout, groups, name = row.layer_type, row.layout, 1, op_name(user)
    if user.target in GENERAL_CONVS:
        layer_type = f"Conv{'Transpose' if layout == 'transposed_conv' else ''}{tensor.dim() - 2}d"
    if layout == "transposed_conv":
        groups = argument(user, row.groups, 1)
    source = argument(user, row.input)
    use = WeightUse(user, layer_type, layout, "", groups, source if isinstance(source, fx.Node) else None)
    if layout is None:
        return replace(use, reason=f"{layer_type} is a normalization")
    if tensor.dim() < 2 or (layer_type == "Linear" and tensor.dim() != 2):
        return replace(use, layout=None, reason=f"a {tensor.dim()}-D constant in {name} has no rows to group")
    if axes == (1, 0):
        use = replace(use, layout={"rows": "columns", "columns": "rows"}.get(layout))
    elif axes != tuple(range(tensor.dim())):
        return replace(use, layout=None, reason=f"{name} reads it with its axes in the order {list(axes)}")
    if use.input is None:
        return replace(use, layout=None, reason=f"{name} of two constants")
    if _times_read(user, unpermuted(argument(user, row.weight))) > 1:
        return replace(use, layout=None, reason=f"{name} reads it as another argument too")
    return use


def _times_read(user: fx.Node, weight: fx.Node) -> int:
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), found.append)
    return sum(unpermuted(node) is weight for node in found)
