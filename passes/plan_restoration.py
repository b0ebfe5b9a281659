"""plan-restoration: decides as a file says. Decisions and codes of an earlier run, on a float graph of the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from mono_quant_fx.errors import PlanError
from mono_quant_fx.graph.annotation import QuantAnnotation, WeightUser, annotated, set_annotation, users_of
from mono_quant_fx.graph.arguments import argument
from mono_quant_fx.graph.biases import add_bias, bias_at
from mono_quant_fx.graph.weight_ops import Weight, find_weights, hidden_weights, matrix_shape
from mono_quant_fx.numerics.affine import QuantizedWeight
from mono_quant_fx.pass_base import Pass


@dataclass(frozen=True)
class PlanRestoration(Pass):
    """Takes the place of skip-annotation, calibration and bias-correction when a saved model is loaded.

    Args:
        plan: the annotations of the emitted graph, in execution order.
        tensors: everything that was saved, by name; on the meta device will do, since only types and sizes are read.

    Raises:
        PlanError: the graph's weights are not the plan's; names the first that differs, and how.
    """

    plan: tuple[QuantAnnotation, ...]
    tensors: Mapping[str, Tensor] = field(repr=False, compare=False)
    name: ClassVar[str] = "plan-restoration"

    def rewrite(self, gm: fx.GraphModule) -> None:
        """Annotates, and gives ops the biases that bias-correction had to add."""
        if any(annotated(gm)):
            return
        weights = {weight.name: weight for weight in find_weights(gm)}
        leaves = defaultdict(list)
        for node, _ in hidden_weights(gm):
            leaves[str(node.target)].append(node)
        planned = {entry.weight for entry in self.plan}
        for name in (*weights, *leaves):
            if name not in planned:
                raise PlanError(f"{self.name}: the model has a weight {name!r} that the plan does not know")
        for entry in self.plan:
            if entry.weight in leaves:
                for node in leaves[entry.weight]:
                    set_annotation(node, entry)
            elif entry.weight in weights:
                self._restore(gm, weights[entry.weight], entry)
            else:
                raise PlanError(f"{self.name}: the plan has a weight {entry.weight!r} that the model does not have")

    def _restore(self, gm: fx.GraphModule, weight: Weight, entry: QuantAnnotation) -> None:
        found = (tuple(weight.tensor.shape), str(weight.tensor.dtype).removeprefix("torch."))
        if found != (entry.shape, entry.dtype):
            raise PlanError(
                f"{self.name}: weight {entry.weight!r} is {found[1]}{list(found[0])} in the model and was "
                f"{entry.dtype}{list(entry.shape)} when the plan was made; build the model as it was then"
            )
        layout = (weight.uses[0].layout or "rows", weight.uses[0].groups)
        if layout != (entry.layout, entry.groups):
            raise PlanError(f"{self.name}: weight {entry.weight!r} is consumed as {layout[0]}, not as {entry.layout}")
        own = replace(entry, users=_users(weight, entry), merged=None, lowered=False)
        if entry.lowered:
            own = replace(own, stored=self._stored(own))
        set_annotation(weight.node, own)
        self._add_biases(gm, weight, own)

    def _stored(self, own: QuantAnnotation) -> QuantizedWeight:
        symmetric = own.scheme is None or own.scheme.symmetric
        names = own.storage_names[: 2 if symmetric else 3]
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise PlanError(f"{self.name}: weight {own.weight!r} has a scheme, but there is no tensor {missing[0]!r}")
        packed, scale, *zero_point = (self.tensors[name] for name in names)
        stored = QuantizedWeight(packed, scale, zero_point[0] if zero_point else None)
        complaint = _complaint(stored, own)
        if complaint is not None:
            raise PlanError(f"{self.name}: weight {own.weight!r} is {own.scheme} in the plan, but {complaint}")
        return stored

    def _add_biases(self, gm: fx.GraphModule, weight: Weight, own: QuantAnnotation) -> None:
        for use, user in zip(weight.uses, own.users, strict=True):
            at = bias_at(use.node)
            if user.bias is None or at is None or argument(use.node, at) is not None:
                continue
            if user.bias not in self.tensors:
                raise PlanError(f"{self.name}: {use.node.name} was given a bias, but there is no tensor {user.bias!r}")
            value = nn.Parameter(self.tensors[user.bias], requires_grad=False)
            add_bias(gm, use.node, weight.node, at, user.bias, value)


def _users(weight: Weight, entry: QuantAnnotation) -> tuple[WeightUser, ...]:
    """The weight's users, with the biases that the plan says they were given."""
    users, planned = users_of(weight), entry.users
    if len(users) != len(planned):
        return users
    return tuple(replace(user, bias=old.bias) for user, old in zip(users, planned, strict=True))


def _complaint(stored: QuantizedWeight, own: QuantAnnotation) -> str | None:
    """What is wrong with the shapes and types of a weight's tensors; None if nothing is."""
    scheme, (rows, columns) = own.scheme, matrix_shape(own.shape, own.layout, own.groups)
    if scheme is None:
        return "it has no scheme"
    group = columns if scheme.group_size == -1 else scheme.group_size
    sizes = (rows, max(1, -(-columns // group)))
    codes = ((rows, -(-columns // 8)), torch.int32) if scheme.bits == 4 else ((rows, columns), torch.int8)
    wanted = (codes, (sizes, getattr(torch, own.dtype)), (sizes, torch.int8))
    for name, tensor, (shape, dtype) in zip(own.storage_names, stored, wanted, strict=True):
        if tensor is not None and (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            return f"{name} is {tensor.dtype}{list(tensor.shape)} and not {dtype}{list(shape)}"
    return None
