"""Parts of forward under no_grad or autocast: what a trace keeps of them.

What is computed without gradients is detached where it leaves the region: the values are the same, and gradients stop
where the model's stop. Autocast changes values, op by op, and a symbolic trace cannot hold it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx.errors import CaptureError

_DEVICES = ("cpu", "cuda", "xpu", "mps")
#: Methods and attributes of a tensor whose values are no tensors, and so have no gradients.
_FACTS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "item", "tolist", "__len__", "is_contiguous"}
)
_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout"})
#: Calls that give several tensors; what reads one of them is detached, and a bundle as a whole is not.
_BUNDLES = frozenset(
    {"chunk", "split", "unbind", "tensor_split", "topk", "sort", "max", "min", "median", "split_with_sizes"}
)


class Regions:
    """Watches what holds while a trace runs, and notes the nodes that are made without gradients.

    Raises:
        CaptureError: when a node is made under autocast that was not there at the beginning.
    """

    def __init__(self) -> None:
        self.had_gradients, self.autocast = torch.is_grad_enabled(), _autocast()
        self.without: set[fx.Node] = set()

    def note(self, node: fx.Node) -> None:
        """To be called for each node as it is made."""
        if _autocast() != self.autocast:
            raise CaptureError(
                "forward enters torch.autocast, whose casts no symbolic trace holds: give an example, on which "
                "torch.export keeps them, or leave autocast to whoever calls the model"
            )
        if self.had_gradients and not torch.is_grad_enabled() and node.op.startswith("call_"):
            self.without.add(node)

    def detach(self, graph: fx.Graph, root: nn.Module) -> None:
        """Detaches what leaves a region without gradients; `root` has the modules that the graph calls."""
        for node in graph.nodes:
            if node.target is operator.getitem and node.args[0] in self.without:
                self.without.add(node)
        for node in [n for n in graph.nodes if n in self.without and not _is_fact(n) and not _is_bundle(n, root)]:
            readers = [user for user in node.users if user not in self.without and not _is_fact(user)]
            if readers:
                with graph.inserting_after(node):
                    detached = graph.call_method("detach", (node,))
                detached.meta = dict(node.meta)
                for reader in readers:
                    reader.replace_input_with(node, detached)


def open_regions(gm: fx.GraphModule) -> None:
    """Puts what torch.export set apart for torch.no_grad or enable_grad back into the graph, in place."""
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            _inline(gm, node)
    gm.recompile()


def _inline(gm: fx.GraphModule, call: fx.Node) -> None:
    enabled, holder, *operands = call.args
    body = gm.get_submodule(str(holder.target))  # type: ignore[union-attr]
    assert isinstance(body, fx.GraphModule)
    open_regions(body)
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
    with gm.graph.inserting_before(call):
        results: Any = gm.graph.graph_copy(body.graph, values)
        for old, new in values.items():
            if old.op == "get_attr" and isinstance(new, fx.Node):
                new.target = f"{holder.target}.{old.target}"  # type: ignore[union-attr]
        results = [r if enabled else _cut(gm.graph, r) for r in results]
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not holder.users:  # type: ignore[union-attr]
        gm.graph.erase_node(holder)  # type: ignore[arg-type]


def _cut(graph: fx.Graph, value: Any) -> Any:
    seen = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(seen, Tensor) or not (seen.is_floating_point() or seen.is_complex()):
        return value
    detached = graph.call_function(torch.ops.aten.detach.default, (value,))
    detached.meta = dict(value.meta)
    return detached


def _autocast() -> list[Any]:
    return [(k, torch.get_autocast_dtype(k)) for k in _DEVICES if torch.is_autocast_enabled(k)]


def _is_fact(node: fx.Node) -> bool:
    """Whether a node's value is a size or the like."""
    if node.op == "call_method" and node.target in _FACTS:
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr and node.args[1] in _ATTRIBUTES:
        return True
    sources = node.all_input_nodes
    return bool(sources) and all(map(_is_fact, sources))


def _is_bundle(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node's value is several tensors, read as a whole."""
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), nn.RNNBase | nn.MultiheadAttention)
    return (str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")) in _BUNDLES
