"""All calibration batches carried through a graph together, node by node; each value is freed after its last use."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from mono_quant_fx.execution.batch import Batch
from mono_quant_fx.execution.run import execute, inputs_of
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.state import written


class Carry:
    """The live values of a walk. A tensor that the graph writes in place is a value too: each batch has its own copy.

    Args:
        gm: the graph; step() wants its nodes in order.
        replaced: get_attr node -> the tensor that stands in for it, or None to read the graph's own.

    Attributes:
        values: node -> one value a batch, for the nodes that are still needed.
        constant: which nodes do not depend on the batches; these are computed when they are read.
    """

    def __init__(self, gm: fx.GraphModule, batches: list[Batch], replaced: Callable[[fx.Node], Tensor | None]):
        self.gm, self.replaced = gm, replaced
        self.inputs = [iter(inputs_of(gm, batch)) for batch in batches]
        self.batches = batches
        self.constant = tensors.constant_nodes(gm, written(gm))
        self.values: dict[fx.Node, list[Any]] = {}
        self.left = Counter(a for n in gm.graph.nodes for a in n.all_input_nodes)

    def fork(self) -> Carry:
        """A walk that goes on from here by itself, past the placeholders.

        The values are copied (together, so that views stay views): an op that works in place would otherwise do so in
        both walks.
        """
        twin = object.__new__(Carry)
        twin.gm, twin.replaced, twin.inputs, twin.constant = self.gm, self.replaced, self.inputs, self.constant
        twin.batches = self.batches
        twin.values = dict(zip(self.values, copy.deepcopy(list(self.values.values())), strict=True))
        twin.left = self.left.copy()
        return twin

    def read(self, node: fx.Node) -> list[Any]:
        """A node's values, one a batch; what does not depend on the batches is the same for each."""
        return [self.constant_value(node)] * len(self.inputs) if self.constant[node] else self.values[node]

    def step(self, node: fx.Node) -> None:
        """Runs one node on every batch.

        Raises:
            CalibrationError: the node fails on a batch.
        """
        if self.constant[node]:
            return
        if node.op == "get_attr":
            self.put(node, [tensors.get_attribute(self.gm, str(node.target)).clone() for _ in self.inputs])
            return
        constants: dict[fx.Node, Any] = {}

        def value_of(source: fx.Node, number: int) -> Any:
            if not self.constant[source]:
                return self.values[source][number]
            if source not in constants:
                constants[source] = self.constant_value(source)
            return constants[source]

        found = [
            execute(self.gm, node, lambda s, i=i: value_of(s, i), inputs, self.batches[i])  # type: ignore[misc]
            for i, inputs in enumerate(self.inputs)
        ]
        self.put(node, found)

    def put(self, node: fx.Node, found: list[Any]) -> None:
        """Takes `found` as the node's values, instead of running it."""
        self.values[node] = found
        for source in node.all_input_nodes:
            self.left[source] -= 1
            if self.left[source] <= 0:
                self.values.pop(source, None)
        if self.left[node] <= 0:
            self.values.pop(node)

    def constant_value(self, node: fx.Node) -> Any:
        """A constant, or what is computed from constants."""
        value = self.replaced(node)
        return execute(self.gm, node, self.constant_value, iter(()), Batch()) if value is None else value
