"""Tensors of a model that forward puts others in the place of (self.s = h.mean(0)): state that no graph keeps."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mono_quant_fx.errors import CaptureError


def check_traced(model: nn.Module, traced: fx.Graph) -> None:
    """Raises CaptureError if tracing left a proxy in the place of a buffer, or of a tensor that the graph reads.

    What forward keeps for whoever looks (self.last = h) is no state, as no forward reads it.
    """
    read = {str(node.target) for node in traced.nodes if node.op == "get_attr"}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in _held(module):
            is_proxy = any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(value))
            if is_proxy and (name in module._buffers or f"{prefix}{name}" in read):
                raise CaptureError(_message(f"{prefix}{name}"))


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that modules hold as ordinary attributes."""
    found = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        found.update({f"{prefix}{n}": v for n, v in vars(module).items() if isinstance(v, Tensor)})
    return found


def check_read(gm: fx.GraphModule, rebound: Collection[str]) -> None:
    """Raises CaptureError if a graph reads one of the tensors that a run of the model has rebound."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target in rebound:
            raise CaptureError(_message(str(node.target)))


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._buffers.items()
    yield from (item for item in vars(module).items() if item[0] not in ("_buffers", "_parameters", "_modules"))


def _message(name: str) -> str:
    last = name.rpartition(".")[2]
    return (
        f"forward rebinds {name} (self.{last} = ...), and a graph keeps no state that way: register it as a buffer and "
        f"write into it (self.{last}.copy_(...)); for a buffer that keeps its shape, example_inputs will do, as "
        "torch.export writes it so"
    )
