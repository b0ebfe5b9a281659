"""Tensors that a graph writes in place: a key-value cache, a running state. They are no constants."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from mono_quant_fx.errors import CaptureError
from mono_quant_fx.graph.effects import may_write, origins
from mono_quant_fx.graph.tensors import STATE, attach, get_attribute, get_tensor, is_persistent

aten = torch.ops.aten


def written(gm: fx.GraphModule) -> list[fx.Node]:
    """The get_attr nodes whose tensor some node writes, or may, itself or through a view, in execution order."""
    found = origins([value for node in gm.graph.nodes for value in may_write(node)])
    return [node for node in gm.graph.nodes if node.op == "get_attr" and node in found]


def own_state(gm: fx.GraphModule) -> None:
    """Gives `gm` copies of the tensors that it writes, so that running it leaves no trace in whoever shares them."""
    targets = dict.fromkeys(str(node.target) for node in written(gm))
    gm.meta[STATE] = tuple(targets)
    for target in targets:
        value = get_attribute(gm, target)
        if isinstance(value, Tensor):
            own = value.detach().clone()
            is_parameter = isinstance(value, nn.Parameter)
            own = nn.Parameter(own, requires_grad=False) if is_parameter else own
            attach(gm, target, own, is_persistent(gm, target))


def share_memory(gm: fx.GraphModule) -> None:
    """Tensors of a model that lie in one memory which the graph writes become views of the one that has it all.

    So they stay together where tensors are copied one by one.

    Raises:
        CaptureError: none of them has it all.
    """
    homes: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        tensor = get_tensor(gm, node)
        if tensor is not None and tensor.numel():
            homes.setdefault(tensor.untyped_storage()._cdata, []).append(node)
    touched = set(written(gm))
    for nodes in homes.values():
        if len(nodes) > 1 and not touched.isdisjoint(nodes):
            _join(gm, nodes)


def _join(gm: fx.GraphModule, nodes: list[fx.Node]) -> None:
    tensors = {node: get_tensor(gm, node) for node in nodes}
    whole = max(nodes, key=lambda n: tensors[n].numel())  # type: ignore[union-attr]
    base = tensors[whole]
    assert base is not None
    start = base.storage_offset()
    for node in nodes:
        part = tensors[node]
        assert part is not None
        first = part.storage_offset() - start
        if part.dtype != base.dtype or not base.is_contiguous() or first < 0 or first + _span(part) > base.numel():
            raise CaptureError(
                f"{node.target} and {whole.target} share memory that forward writes, and neither is a view of the "
                "other; register one buffer that holds both, and take views of it in forward"
            )
    if nodes[0] is not whole:
        nodes[0].prepend(whole)
    for node in nodes:
        if node is not whole:
            _look(gm, node, whole, tensors[node], start)  # type: ignore[arg-type]


def _span(tensor: Tensor) -> int:
    """From its first element to behind its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _look(gm: fx.GraphModule, node: fx.Node, whole: fx.Node, tensor: Tensor, start: int) -> None:
    """Puts a view of `whole` in the place of `node`; one that a file can hold, where that is possible."""
    first, shape = tensor.storage_offset() - start, list(tensor.shape)
    with gm.graph.inserting_before(node):
        if tensor.is_contiguous():
            flat = gm.graph.call_function(aten.view.default, (whole, [-1]))
            part = gm.graph.call_function(aten.slice.Tensor, (flat, 0, first, first + tensor.numel()))
            look = gm.graph.call_function(aten.view.default, (part, shape))
        else:
            look = gm.graph.call_function(aten.as_strided.default, (whole, shape, list(tensor.stride()), first))
    look.meta = dict(node.meta)
    node.replace_all_uses_with(look)
    gm.graph.erase_node(node)
