"""check_pass: one call that holds a pass to the whole contract."""

from __future__ import annotations

import copy
import textwrap
from typing import Any

import torch
from torch import fx

import mono_quant_fx as mq
from mono_quant_fx.graph.fingerprint import fingerprint
from mono_quant_fx.graph.tensors import named_tensors

#: torch's own and the project's meta keys that a rewrite has to carry along wherever a node survives
KEPT_META = ("nn_module_stack", "stack_trace")


def check_pass(
    pass_: mq.Pass,
    gm: fx.GraphModule,
    *,
    modified: bool = True,
    before: str | None = None,
    after: str | None = None,
    args: tuple[Any, ...] | None = None,
    tolerance: float | None = 0.0,
) -> fx.GraphModule:
    """Runs `pass_` on `gm` and checks: golden graphs, `modified`, input untouched bitwise, meta kept, an origin for
    each new node, second run a no-op, deepcopy works, and (with `args`) the output within `tolerance` of the input
    graph's (None: any output). Returns the resulting graph.
    """
    if before is not None:
        assert_graph(gm, before)
    snapshot = Snapshot(gm)
    result = pass_(gm)
    snapshot.check(gm)
    assert result.modified is modified
    assert (result.graph_module is not gm) is modified
    if after is not None:
        assert_graph(result.graph_module, after)
    _check_meta(gm, result.graph_module)
    _check_history(pass_, gm, result.graph_module)
    again = pass_(result)
    assert again.modified is False, "a second run changed the graph"
    assert again.graph_module is result.graph_module
    _check_history(pass_, gm, again.graph_module)
    result.graph_module.graph.lint()
    twin = copy.deepcopy(result.graph_module)
    assert mq.format_graph(twin) == mq.format_graph(result.graph_module)
    if args is not None:
        actual = result.graph_module(*args)
        assert torch.equal(twin(*args), actual)
        if tolerance is not None:
            torch.testing.assert_close(actual, gm(*args), rtol=tolerance, atol=tolerance)
    return result.graph_module


def assert_graph(gm: fx.GraphModule, expected: str) -> None:
    """The graph's text, line for line."""
    actual, wanted = mq.format_graph(gm), textwrap.dedent(expected).strip()
    assert actual == wanted, f"the graph reads\n{actual}"


class Snapshot:
    """Everything about a module that nobody may change: values, identities, flags, and the graph if it has one."""

    def __init__(self, module: torch.nn.Module):
        self.identities = {n: id(t) for n, t in named_tensors(module)}
        self.values = {n: t.detach().clone() for n, t in named_tensors(module)}
        self.versions = {n: t._version for n, t in named_tensors(module)}
        self.flags = [(n, m.training) for n, m in module.named_modules()]
        self.grads = {n: t.requires_grad for n, t in named_tensors(module)}
        self.fingerprint = fingerprint(module) if isinstance(module, fx.GraphModule) else None

    def check(self, module: torch.nn.Module) -> None:
        """Asserts that `module` is as it was, to the bit."""
        tensors = dict(named_tensors(module))
        assert {n: id(t) for n, t in tensors.items()} == self.identities
        assert {n: t._version for n, t in tensors.items()} == self.versions
        assert {n: t.requires_grad for n, t in tensors.items()} == self.grads
        for name, value in self.values.items():
            same = (
                torch.equal(tensors[name].detach().view(torch.uint8), value.view(torch.uint8))
                if value.dim()
                else (torch.equal(tensors[name], value))
            )
            assert same, name
        assert [(n, m.training) for n, m in module.named_modules()] == self.flags
        if isinstance(module, fx.GraphModule):
            assert fingerprint(module) == self.fingerprint


def _check_meta(before: fx.GraphModule, after: fx.GraphModule) -> None:
    old = {n.name: n for n in before.graph.nodes}
    for node in after.graph.nodes:
        twin = old.get(node.name)
        if twin is None:
            sources = [a for a in node.all_input_nodes if "nn_module_stack" in a.meta]
            assert not sources or "nn_module_stack" in node.meta, f"{node.name} has no origin"
            continue
        for key in KEPT_META:
            assert node.meta.get(key) == twin.meta.get(key), (node.name, key)


def _check_history(pass_: mq.Pass, before: fx.GraphModule, after: fx.GraphModule) -> None:
    """Each node keeps what its history told before; what this pass did stands behind it, once, and has a source."""
    earlier = {step for node in before.graph.nodes for step in mq.history(node)}
    old = {n.name: n for n in before.graph.nodes}
    for node in after.graph.nodes:
        steps = mq.history(node)
        own = [step for step in steps if step not in earlier]
        assert list(steps[len(steps) - len(own) :]) == own and len(steps) == len(set(steps)), node.name
        assert all(step.pass_name == pass_.name for step in own), node.name
        assert all(step.sources and set(step.sources) <= set(old) for step in own), f"{node.name} has no origin"
        created = [step.node for step in own if step.action == "created"]
        twin = old.get(node.name)
        if twin is None:
            assert created == [node.name], f"{node.name} has no origin"
        elif not created:
            assert steps[: len(steps) - len(own)] == mq.history(twin), node.name
            assert (twin.op, twin.target) == (node.op, node.target) or own, f"{node.name} changed unseen"
