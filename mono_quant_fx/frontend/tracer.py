"""The symbolic tracer: functional ops on get_attr weights, one node a tensor, inputs chosen by name."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from mono_quant_fx.errors import CaptureError
from mono_quant_fx.frontend.regions import Regions
from mono_quant_fx.frontend.writable_proxy import WritableProxy
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.weight_table import WEIGHT_MODULES


class TensorProxy(WritableProxy):
    """A tensor of the model under tracing: shape, dtype and device are plain Python values, all else is recorded."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor):
        super().__init__(node, tracer)
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        """The tensor's size."""
        return self.tensor.shape

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self.tensor.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The element type, so that `x.to(self.weight.dtype)` is no use of the weight."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensor lives."""
        return self.tensor.device

    def size(self, dim: int | None = None) -> Any:
        """The size, whole or of one dimension."""
        return self.tensor.shape if dim is None else self.tensor.shape[dim]

    def dim(self) -> int:
        """The number of dimensions."""
        return self.tensor.dim()

    def numel(self) -> int:
        """The number of elements."""
        return self.tensor.numel()


class QuantTracer(fx.Tracer):
    """A tracer that opens the modules of weight_table.WEIGHT_MODULES and reads every tensor through one get_attr node.

    Args:
        inputs: names of forward's parameters that become placeholders; the others keep their defaults. None: those
            without a default.
        positional: how many of them, the first, are passed by place, as hooks see them; None: all that can be.
    """

    def __init__(self, inputs: list[str] | None = None, positional: int | None = None):
        super().__init__()
        self.inputs, self.positional = inputs, positional
        self.record_stack_traces = True
        self._names: dict[int, str] = {}
        self._proxies: dict[str, fx.Proxy] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """See torch.fx.Tracer.proxy."""
        return WritableProxy(node, self)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """See torch.fx.Tracer.trace."""
        for name, tensor in tensors.named_tensors(root):
            self._names.setdefault(id(tensor), name)
        self._regions = Regions()
        traced = super().trace(root, concrete_args)
        self._regions.detach(traced, root)
        return traced

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """See torch.fx.Tracer.create_node; notes what holds around the call."""
        node = super().create_node(*args, **kwargs)
        self._regions.note(node)
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Weight modules are opened, and what has forward hooks; the rest of torch.nn, and TorchScript, stays whole."""
        if isinstance(m, torch.jit.ScriptModule):
            return True
        hooked = m._forward_hooks or m._forward_pre_hooks
        return type(m) not in WEIGHT_MODULES and not hooked and super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A transposed convolution asked for an output size computes with sizes, so that it stays a leaf."""
        if m is self.root:
            return forward(*args, **kwargs)
        if isinstance(m, _ConvTransposeNd) and (len(args) > 1 or kwargs):
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A tensor of the model becomes its one get_attr node."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        return attr_val if name is None else self._proxy(name, attr_val)

    def create_arg(self, a: Any) -> Any:
        """Tensors that reach a call without an attribute access (from a ParameterList, say) get the same node."""
        if isinstance(a, Tensor) and id(a) in self._names:
            return self._proxy(self._names[id(a)], a).node
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for the chosen inputs only; every other parameter keeps its default."""
        inputs = required_inputs(self.root) if self.inputs is None else self.inputs
        proxies = {name: self.create_proxy("placeholder", name, (), {}) for name in inputs}
        count = _by_place(self.root, inputs) if self.positional is None else self.positional
        args = [proxies.pop(name) for name in inputs[:count]]
        return lambda root: root(*args, **proxies), [self.root]  # the call, with its hooks, as the user makes it

    def _proxy(self, name: str, tensor: Tensor) -> fx.Proxy:
        if name not in self._proxies:
            node = self.create_node("get_attr", name, (), {})
            self._proxies[name] = TensorProxy(node, self, tensor)
        return self._proxies[name]


def required_inputs(model: nn.Module) -> list[str]:
    """forward's parameters without a default.

    Raises:
        CaptureError: forward takes *args, so that the names cannot be known.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        raise CaptureError("forward takes *args, whose number is unknown without example_inputs")
    required = (p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD)
    return [p.name for p in required]


def _by_place(model: nn.Module, inputs: list[str]) -> int:
    """How many of the inputs, the first, can be passed by place."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    return len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(inputs, names, strict=False))])
