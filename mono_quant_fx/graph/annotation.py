"""The decision about one weight, and the only code that reads or writes it on node.meta.

It sits on the get_attr node of the weight (one node a tensor, tied weights included) and moves to the get_attr node of
the packed weight when the weight is lowered; for a module that stayed a leaf it sits on the call_module node, and where
linear-merging has put the weight's rows into a larger one, on the node that holds what its op gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import fx

from mono_quant_fx.config import QuantScheme
from mono_quant_fx.graph.arguments import Arg, argument
from mono_quant_fx.graph.tensors import get_attribute
from mono_quant_fx.graph.weight_ops import Weight
from mono_quant_fx.graph.weight_table import consumption
from mono_quant_fx.numerics.affine import QuantizedWeight

KEY = "mono_quant_fx"


@dataclass(frozen=True)
class WeightUser:
    """One op that consumes the weight: its node's name, the op's name, its module's path, its activation's node.

    `bias` is the name of the bias that bias-correction gave it; None where it had one before, or has none.
    """

    node: str
    op: str
    module: str
    input: str | None = None
    bias: str | None = None


def users_of(weight: Weight) -> tuple[WeightUser, ...]:
    """Its consumers, as an annotation names them."""
    return tuple(
        WeightUser(use.node.name, use.op, weight.module_of(use), use.input.name if use.input else None)
        for use in weight.uses
    )


@dataclass(frozen=True)
class ObservedInput:
    """What an observer saw on the input of one consumer, and the qparams that follow if that input becomes INT8.

    Attributes:
        source: the node observed.
        observer, reason: which observer, and why if it chose itself.
        statistics: as plain numbers.
        scale, zero_point: None where the activation stays float.
    """

    source: str
    observer: str
    statistics: dict[str, tuple[float, ...]] = field(default_factory=dict)
    reason: str = ""
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class MergedRows:
    """Where the rows of a lowered weight lie: rows start <= i < stop of what is stored under the name `weight`.

    `bias` is the name that the bias of its op had; None without one.
    """

    weight: str
    start: int
    stop: int
    bias: str | None = None


@dataclass(frozen=True)
class QuantAnnotation:
    """A weight, what becomes of it, and why.

    Attributes:
        weight: its fully qualified name; for a leaf module, the module's name.
        scheme: how it is stored; None keeps it as it is.
        reason: one line for the table: the rule that decided, and what it changed.
        shape, dtype: of the float weight, as the model has it.
        layout, groups: how it is viewed as a matrix [N, K] (see weight_ops.Layout).
        users: the ops that consume it, in execution order.
        activations: what becomes of their inputs: "" (they stay float), "int8 asym" or "int8 sym".
        observed: what calibration saw on their inputs.
        stored: the codes that calibration found, until lowering puts them into the graph.
        algorithm: what rounded it: rtn, clip or gptq.
        gain_db, int8_gain_db: on the calibration inputs, how much less output error than plain rounding gives, and how
            much less INT8 would give; None without data.
        bias_gain_db: by how much bias-correction lowered the error of its ops' outputs, at most; None before it ran.
        lowered: the codes have replaced it.
        merged: the rows of a larger weight that hold its codes; None while it is stored under its own name.
        names: of its codes, scale and zero point, where the model has tensors of its own under the usual ones.
    """

    weight: str
    scheme: QuantScheme | None
    reason: str
    shape: tuple[int, ...]
    dtype: str
    layout: str = "rows"
    groups: int = 1
    users: tuple[WeightUser, ...] = ()
    activations: str = ""
    observed: tuple[ObservedInput, ...] = ()
    stored: QuantizedWeight | None = field(default=None, repr=False, compare=False)
    algorithm: str = ""
    gain_db: float | None = None
    int8_gain_db: float | None = None
    bias_gain_db: float | None = None
    lowered: bool = False
    merged: MergedRows | None = None
    names: tuple[str, str, str] | None = None

    @property
    def storage_names(self) -> tuple[str, str, str]:
        """Where codes, scale and zero point are stored: by compressed-tensors' names (INT8 codes: the weight's own).

        A number stands behind them where the model has tensors of its own under these names.
        """
        if self.names is not None and self.merged is None:
            return self.names
        name = self.merged.weight if self.merged is not None else self.weight
        packed = name if self.scheme is not None and self.scheme.bits == 8 else f"{name}_packed"
        return packed, f"{name}_scale", f"{name}_zero_point"


def get_annotation(node: fx.Node) -> QuantAnnotation | None:
    """The annotation on a node, if any."""
    return node.meta.get(KEY)


def set_annotation(node: fx.Node, annotation: QuantAnnotation) -> None:
    """Puts (or replaces) the annotation on a node."""
    node.meta[KEY] = annotation


def drop_annotation(node: fx.Node) -> None:
    """Removes the annotation from a node."""
    node.meta.pop(KEY, None)


def annotated(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, QuantAnnotation]]:
    """Every annotated node, in execution order."""
    for node in gm.graph.nodes:
        annotation = get_annotation(node)
        if annotation is not None:
            yield node, annotation


def part_names(gm: fx.GraphModule) -> set[str]:
    """The names that the parts of merged tensors have by themselves: a file stores them so."""
    found: set[str] = set()
    for _, annotation in annotated(gm):
        if annotation.merged is not None:
            bias = annotation.merged.bias
            found.update(replace(annotation, merged=None).storage_names, () if bias is None else (bias,))
    return found


def drop_gone_users(gm: fx.GraphModule) -> None:
    """Takes the ops that are no longer in the graph out of every annotation."""
    names = {node.name for node in gm.graph.nodes}
    for node, annotation in annotated(gm):
        users = tuple(use for use in annotation.users if use.node in names)
        if len(users) < len(annotation.users):
            set_annotation(node, replace(annotation, users=users))


def plain_inputs(
    weight: fx.Node, annotation: QuantAnnotation, nodes: dict[str, fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node, Arg]]:
    """(activation, op, where) for each op that reads its activation as it is: neither observed nor quantized.

    `where` is the argument that the weight's rows multiply; the op may read the same tensor as another one as well, and
    there it stays what it is. An embedding has none: its input is no activation. Ops that are gone do not count.

    Args:
        weight: the get_attr node that carries `annotation`.
        nodes: the graph's, by name.
    """
    for use in annotation.users:
        user = nodes.get(use.node)
        row = None if user is None else consumption(user, weight)
        if user is None or row is None or "embedding" in use.op:
            continue
        source = argument(user, row.input)
        if isinstance(source, fx.Node) and source.name == use.input:
            yield source, user, row.input


def float_inputs(
    weight: fx.Node, annotation: QuantAnnotation, nodes: dict[str, fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node, Arg]]:
    """Those of plain_inputs that are to be INT8: `activations` asks for it, and calibration does not speak against it.

    What no calibration data reached has no range, and stays float.
    """
    if annotation.activations:
        unseen = {seen.source for seen in annotation.observed if seen.scale is None}
        yield from (found for found in plain_inputs(weight, annotation, nodes) if found[0].name not in unseen)


def stored_weight(gm: fx.GraphModule, annotation: QuantAnnotation) -> QuantizedWeight:
    """The stored tensors of a lowered weight: views of its rows where it is merged."""
    packed, scale, zero_point = annotation.storage_names
    symmetric = annotation.scheme is None or annotation.scheme.symmetric
    zero = None if symmetric else get_attribute(gm, zero_point)
    stored = QuantizedWeight(get_attribute(gm, packed), get_attribute(gm, scale), zero)
    if annotation.merged is None:
        return stored
    rows = slice(annotation.merged.start, annotation.merged.stop)
    return QuantizedWeight(*(None if tensor is None else tensor[rows] for tensor in stored))  # type: ignore[arg-type]


def pending(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, QuantAnnotation]]:
    """The annotated weights that have a scheme and are not lowered yet."""
    for node, annotation in annotated(gm):
        if annotation.scheme is not None and not annotation.lowered:
            yield node, annotation
