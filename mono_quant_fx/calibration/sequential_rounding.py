"""Sequential calibration on the graph: quantize a weight, go on with what the quantized graph computes.

All batches are carried node by node in execution order. An op's statistics come from inputs that the quantized ops
before it produced; then its weight is rounded, and the walk goes on with the rounded weight. Held are the live values
of the graph times the batches, and one Hessian. A weight that several ops use is rounded at its first use, from the
inputs of all its uses: those up to its last use are computed ahead, in float, on a copy that is then dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, fx

from mono_quant_fx import ops
from mono_quant_fx.calibration.layer_inputs import Hessian, layer_inputs, no_matrix
from mono_quant_fx.calibration.observers import Observer
from mono_quant_fx.execution.batch import Batch
from mono_quant_fx.execution.carry import Carry
from mono_quant_fx.execution.run import check_finite, node_error
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import QuantAnnotation, pending
from mono_quant_fx.graph.arguments import argument
from mono_quant_fx.graph.codes import restore
from mono_quant_fx.graph.weight_ops import matrix_shape
from mono_quant_fx.graph.weight_table import consumption
from mono_quant_fx.numerics.rounding import Rounded

#: (get_attr node, annotation, Hessian or None, why there is none) -> the rounded weight.
RoundWeight = Callable[[fx.Node, QuantAnnotation, Tensor | None, str], Rounded]
#: Why a weight has no Hessian.
NO_DATA, ALL_ZERO = "no calibration data reached it", "its inputs are zero in all of the calibration data"


class SequentialWalk:
    """One walk of all batches through an annotated (and observed) graph.

    Args:
        gm: the graph; its observers take in what flows by. What an observer hands to ops whose inputs are to be INT8 is
            rounded to INT8 right away, so that all that follows sees it.
        round_weight: (get_attr node, annotation, Hessian [groups, K, K] or None, why it is None) -> the rounded weight.
    """

    def __init__(self, gm: fx.GraphModule, batches: list[Batch], round_weight: RoundWeight):
        self.gm, self.round_weight = gm, round_weight
        self.nodes = list(gm.graph.nodes)
        self.carry = Carry(gm, batches, self._restored)
        self.rounded: dict[fx.Node, Rounded] = {}
        self.waiting: dict[str, list[tuple[fx.Node, QuantAnnotation]]] = {}
        self.names = {node.name for node in self.nodes}
        self.annotations = dict(pending(gm))
        for node, annotation in self.annotations.items():
            for user in annotation.users:
                self.waiting.setdefault(user.node, []).append((node, annotation))

    @torch.no_grad()
    def run(self) -> dict[fx.Node, Rounded]:
        """get_attr node -> rounded weight, for every weight that has a scheme.

        Raises:
            CalibrationError: a node fails on a batch, or an input of a weight holds NaN or infinity.
        """
        last = max((i for i, n in enumerate(self.nodes) if n.name in self.waiting), default=-1)
        for at, node in enumerate(self.nodes[: last + 1]):
            for weight, annotation in self.waiting.get(node.name, ()):
                if weight not in self.rounded:
                    self.rounded[weight] = self.round_weight(weight, annotation, *self._hessian(at, weight, annotation))
            self.carry.step(node)
            if self._is_observer(node):
                self._quantize_activation(node)
        return self.rounded

    def _hessian(self, at: int, weight: fx.Node, annotation: QuantAnnotation) -> tuple[Tensor | None, str]:
        """The Hessian over all uses of a weight from here on that have one; where none does, the reason."""
        users = {user.node for user in annotation.users} & self.names
        total, remaining, missing = Hessian(), set(users), ""
        ahead = self.carry.fork() if len(users) > 1 else self.carry
        for node in itertools.islice(self.nodes, at, None):
            if node.name in users:
                remaining.discard(node.name)
                missing = self._observe(node, weight, annotation, ahead, total) or missing
            if not remaining:
                break
            if self._is_observer(node) and not ahead.constant[node]:
                ahead.put(node, ahead.values[node.all_input_nodes[0]])
            else:
                ahead.step(node)
        if total.value is None or not total.rows:
            return None, missing or NO_DATA
        return (total.value, "") if bool(total.value.any()) else (None, ALL_ZERO)

    def _observe(
        self, node: fx.Node, weight: fx.Node, annotation: QuantAnnotation, carry: Carry, total: Hessian
    ) -> str:
        """Adds what one op multiplies the weight's columns with; returns why it cannot."""
        row = consumption(node, weight)
        source = None if row is None else argument(node, row.input)
        why = no_matrix(node, row, annotation.shape)
        if why or row is None or not isinstance(source, fx.Node):
            return why or f"the input of {tensors.op_name(node)} is no value of the graph"
        columns = matrix_shape(annotation.shape, annotation.layout, annotation.groups)[1]
        for batch, value in zip(carry.batches, carry.read(source), strict=True):
            check_finite(value, f"the input of node {node.name!r} (weight {annotation.weight!r})", batch)
            try:
                inputs = layer_inputs(node, row, value, annotation.shape)
            except (RuntimeError, ValueError) as e:
                raise node_error(node, [value], batch, e) from e
            if inputs.shape[2] != columns:  # the op itself will say what does not fit
                return f"{tensors.op_name(node)} gets inputs of {inputs.shape[2]} columns, not {columns}"
            total.add(inputs)
        return ""

    def _quantize_activation(self, node: fx.Node) -> None:
        """Rounds what an observer hands on, by the range that it has just seen."""
        source = node.all_input_nodes[0].name
        symmetry = {a.activations for a in self.annotations.values() for u in a.users if u.input == source}
        observer = tensors.get_attribute(self.gm, str(node.target))
        if node not in self.carry.values or not any(symmetry) or not observer.has_seen:
            return
        scale, zero_point = observer.calculate_qparams(8, "int8 sym" in symmetry)
        self.carry.values[node] = [_round_trip(x, scale, zero_point) for x in self.carry.values[node]]

    def _restored(self, node: fx.Node) -> Tensor | None:
        """The weight as it is by now: what its codes stand for, or None while it is float."""
        rounded = self.rounded.get(node)
        if rounded is None:
            return None
        assert rounded.stored is not None
        return restore(rounded.stored, self.annotations[node])

    def _is_observer(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        return isinstance(tensors.get_attribute(self.gm, str(node.target)), Observer)


def _round_trip(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    qparams = scale.reshape(1).to(x.dtype), zero_point.reshape(1).to(torch.int8)
    return ops.dequantize_activation(ops.quantize_activation(x, *qparams), *qparams)
