"""Two versions of one graph, walked side by side: each value is freed at its last use, so only the live set is held.

Nodes correspond by name, which every pass keeps. For a node of both graphs there are up to three outputs to compare:

    reference      the float node on float inputs
    accumulated    the quantized node on the quantized graph's own inputs: its error and all errors before it
    local          the quantized node on float inputs: the error of this node alone
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from mono_quant_fx.execution.batch import Batch
from mono_quant_fx.execution.noise import Noise
from mono_quant_fx.execution.run import execute, inputs_of
from mono_quant_fx.graph.state import written
from mono_quant_fx.graph.tensors import constant_nodes, get_tensor

Visit = Callable[[fx.Node, Any, Any, Any], None]


class Lockstep:
    """The plan of a walk over (reference, quantized), made once and run for every batch.

    Args:
        local_at: names of the nodes whose local output is wanted.
    """

    def __init__(self, reference: fx.GraphModule, quantized: fx.GraphModule, local_at: set[str]):
        self.reference, self.quantized = reference, quantized
        self.twins = {n.name: n for n in reference.graph.nodes}
        self.constant = constant_nodes(quantized)
        calls = [n for n in quantized.graph.nodes if n.op.startswith("call_")]
        self.local_at = {n for n in calls if n.name in local_at and n.name in self.twins}
        self._uses_reference, self._uses_quantized, self._uses_local = self._count_uses()
        own = [get_tensor(gm, node) for gm in (reference, quantized) for node in written(gm)]
        self._state = [(tensor, tensor.detach().clone()) for tensor in own if tensor is not None]

    def run(self, batch: Batch, visit: Visit) -> None:
        """Calls visit(node, reference, accumulated, local or None) for each node of both graphs, in order.

        Random ops draw the same numbers in all versions, and the generator is left as it was. So is what the graphs
        write in place: each batch begins with a cache as it was at first.

        Raises:
            CalibrationError: the batch does not fit, or a node fails on it.
        """
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                _Run(self, batch).walk(visit)
            finally:
                for tensor, before in self._state:
                    if not torch.equal(tensor, before):  # it may be another's, and was perhaps not written
                        tensor.copy_(before)

    def local_inputs(self, node: fx.Node) -> Iterator[tuple[bool, fx.Node]]:
        """(from the reference?, node) for every value that the local output of `node` is computed from."""
        for source in node.all_input_nodes:
            if self.constant[source]:
                yield False, source
            elif source.name in self.twins:
                yield True, self.twins[source.name]
            else:
                yield from self.local_inputs(source)

    def local_sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """Every node of the quantized graph alone that the local output of `node` is computed from on the way."""
        for source in node.all_input_nodes:
            if not self.constant[source] and source.name not in self.twins:
                yield source
                yield from self.local_sources(source)

    def _count_uses(self) -> tuple[Counter[fx.Node], Counter[fx.Node], Counter[fx.Node]]:
        reference = Counter(a for n in self.reference.graph.nodes for a in n.all_input_nodes)
        quantized = Counter(a for n in self.quantized.graph.nodes for a in n.all_input_nodes)
        local = Counter(source for node in self.local_at for source in self.local_sources(node))
        for node in self.local_at:
            for from_reference, source in self.local_inputs(node):
                (reference if from_reference else quantized)[source] += 1
        return reference, quantized, local

    def uses(self) -> tuple[Counter[fx.Node], Counter[fx.Node], Counter[fx.Node]]:
        """Fresh counts of the uses of each value, to be counted down by one run."""
        return self._uses_reference.copy(), self._uses_quantized.copy(), self._uses_local.copy()


class _Run:
    """One batch on its way through both graphs."""

    def __init__(self, plan: Lockstep, batch: Batch):
        self.plan, self.batch, self.noise = plan, batch, Noise()
        self.left_reference, self.left_quantized, self.left_local = plan.uses()
        self.reference: dict[fx.Node, Any] = {}
        self.accumulated: dict[fx.Node, Any] = {}
        self.local: dict[fx.Node, Any] = {}  # of the nodes that the quantized graph has alone, on float inputs
        self.inputs = (iter(inputs_of(plan.reference, batch)), iter(inputs_of(plan.quantized, batch)))
        self.ahead = iter(plan.reference.graph.nodes)

    def walk(self, visit: Visit) -> None:
        plan = self.plan
        for node in plan.quantized.graph.nodes:
            twin = plan.twins.get(node.name)
            if twin is not None and twin not in self.reference:
                self._advance(twin)
            value = self._quantized(node, self.accumulated.__getitem__, self.inputs[1])
            self.accumulated[node] = value
            if twin is not None:
                local = self._local(node) if node in plan.local_at else None
                visit(node, self.reference[twin], value, local)
                self._release(self.reference, self.left_reference, twin)
            for source in node.all_input_nodes:
                self._used(self.accumulated, self.left_quantized, source)
            self._release(self.accumulated, self.left_quantized, node)

    def _advance(self, until: fx.Node) -> None:
        for node in self.ahead:
            self.reference[node] = self._exact(node)
            for source in node.all_input_nodes:
                self._used(self.reference, self.left_reference, source)
            if node is until:
                return
            self._release(self.reference, self.left_reference, node)

    def _exact(self, node: fx.Node) -> Any:
        return self.noise.first(
            node.name,
            lambda: execute(self.plan.reference, node, self.reference.__getitem__, self.inputs[0], self.batch),
        )

    def _quantized(self, node: fx.Node, value_of: Callable[[fx.Node], Any], inputs: Iterator[Any]) -> Any:
        return self.noise.again(node.name, lambda: execute(self.plan.quantized, node, value_of, inputs, self.batch))

    def _local(self, node: fx.Node) -> Any:
        value = self._quantized(node, self._local_value, iter(()))
        for from_reference, source in self.plan.local_inputs(node):
            if from_reference:
                self._used(self.reference, self.left_reference, source)
            else:
                self._used(self.accumulated, self.left_quantized, source)
        for source in self.plan.local_sources(node):
            self._used(self.local, self.left_local, source)
        return value

    def _local_value(self, source: fx.Node) -> Any:
        if self.plan.constant[source]:
            return self.accumulated[source]
        twin = self.plan.twins.get(source.name)
        if twin is not None:
            return self.reference[twin]
        if source not in self.local:
            self.local[source] = self._quantized(source, self._local_value, iter(()))
        return self.local[source]

    def _used(self, values: dict[fx.Node, Any], left: Counter[fx.Node], node: fx.Node) -> None:
        left[node] -= 1
        self._release(values, left, node)

    def _release(self, values: dict[fx.Node, Any], left: Counter[fx.Node], node: fx.Node) -> None:
        if left[node] <= 0 and node.op != "output":
            values.pop(node, None)
