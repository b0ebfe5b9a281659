"""Sequential calibration on the graph: quantize a weight, go on with what the quantized graph computes.

All batches are carried node by node in execution order. An op's statistics come from inputs that the quantized ops
before it produced; then its weight is rounded, and the walk goes on with the rounded weight. Held are the live values
of the graph times the batches, and one Hessian. A weight that several ops use is rounded at its first use, from the
inputs of all its uses: those up to its last use are computed ahead, in float, on a copy that is then dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from mono_quant_fx import graph, numerics
from mono_quant_fx.annotation import QuantAnnotation, pending
from mono_quant_fx.data import Batch
from mono_quant_fx.errors import CalibrationError
from mono_quant_fx.layer_inputs import Hessian, layer_inputs
from mono_quant_fx.observers import Observer
from mono_quant_fx.rounding import Rounded
from mono_quant_fx.run import execute
from mono_quant_fx.weight_ops import from_matrix

RoundWeight = Callable[[fx.Node, QuantAnnotation, Tensor | None], Rounded]
Values = dict[fx.Node, list[Any]]


class SequentialWalk:
    """One walk of all batches through an annotated (and observed) graph.

    Args:
        gm: the graph; its observers take in what flows by.
        round_weight: (get_attr node, annotation, Hessian [groups, K, K] or None) -> the rounded weight.
    """

    def __init__(self, gm: fx.GraphModule, batches: list[Batch], round_weight: RoundWeight):
        self.gm, self.round_weight, self.batches = gm, round_weight, batches
        self.inputs = [iter(batch.bind(gm)) for batch in batches]
        self.nodes = list(gm.graph.nodes)
        self.constant = graph.constant_nodes(gm)
        self.rounded: dict[fx.Node, Rounded] = {}
        self.waiting: dict[str, list[tuple[fx.Node, QuantAnnotation]]] = {}
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
        values: Values = {}
        left = Counter(a for n in self.nodes for a in n.all_input_nodes)
        last = max((i for i, n in enumerate(self.nodes) if n.name in self.waiting), default=-1)
        for at, node in enumerate(self.nodes[: last + 1]):
            if self.constant[node]:
                continue
            for weight, annotation in self.waiting.get(node.name, ()):
                if weight not in self.rounded:
                    hessian = self._hessian(at, annotation, values, left)
                    self.rounded[weight] = self.round_weight(weight, annotation, hessian)
            self._step(node, values, left)
        return self.rounded

    def _hessian(self, at: int, annotation: QuantAnnotation, values: Values, left: Counter[fx.Node]) -> Tensor | None:
        users = {user.node: user.input for user in annotation.users}
        total = Hessian()
        ahead, left = {n: list(v) for n, v in values.items()}, left.copy()
        remaining = set(users)
        for node in self.nodes[at:]:
            if node.name in users:
                remaining.discard(node.name)
                self._observe(node, annotation, users[node.name], ahead, total)
            if not remaining:
                break
            if not self.constant[node]:
                self._step(node, ahead, left, is_ahead=True)
        return total.value

    def _observe(
        self, node: fx.Node, annotation: QuantAnnotation, source: str | None, values: Values, total: Hessian
    ) -> None:
        for number, value in enumerate(self._activation(node, source, values)):
            if not value.is_floating_point():
                return
            if not bool(torch.isfinite(value).all()):
                raise CalibrationError(
                    f"batch {number}: the input of node {node.name!r} (weight {annotation.weight!r}) holds NaN or "
                    "infinity; look at this batch, or at the ops before this node"
                )
            inputs = layer_inputs(node, value, annotation.shape)
            if inputs is not None:
                total.add(inputs)

    def _activation(self, node: fx.Node, source: str | None, values: Values) -> list[Tensor]:
        for candidate in node.all_input_nodes:
            origin = candidate.all_input_nodes[0] if self._is_observer(candidate) else candidate
            if origin.name == source:
                return values[candidate]
        return []

    def _step(self, node: fx.Node, values: Values, left: Counter[fx.Node], is_ahead: bool = False) -> None:
        """Runs one node on every batch and frees what nobody needs any more."""
        constants: dict[fx.Node, Any] = {}

        def value_of(source: fx.Node, number: int) -> Any:
            if not self.constant[source]:
                return values[source][number]
            if source not in constants:
                constants[source] = self._constant(source)
            return constants[source]

        if is_ahead and self._is_observer(node):
            values[node] = values[node.all_input_nodes[0]]
        else:
            values[node] = [
                execute(self.gm, node, lambda s, i=i: value_of(s, i), inputs, i)  # type: ignore[misc]
                for i, inputs in enumerate(self.inputs)
            ]
        for source in node.all_input_nodes:
            left[source] -= 1
            if left[source] <= 0:
                values.pop(source, None)
        if left[node] <= 0:
            values.pop(node)

    def _constant(self, node: fx.Node) -> Any:
        """A weight as it is by now (rounded or float), or what is computed from such constants."""
        rounded = self.rounded.get(node)
        if rounded is None:
            return execute(self.gm, node, self._constant, iter(()), 0)
        assert rounded.stored is not None
        return restore(rounded.stored, self.annotations[node])

    def _is_observer(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        return isinstance(graph.get_attribute(self.gm, str(node.target)), Observer)


def restore(stored: numerics.QuantizedWeight, annotation: QuantAnnotation) -> Tensor:
    """The float weight, in its own shape, that stored codes stand for."""
    assert annotation.scheme is not None
    columns = torch.Size(annotation.shape).numel() // stored.weight_packed.shape[0]
    matrix = numerics.dequantize_weight(stored, annotation.scheme.group_size, columns)
    return from_matrix(matrix, annotation.layout, annotation.groups, annotation.shape, lambda op, *args: op(*args))
