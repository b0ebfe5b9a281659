"""The symbolic tracer: functional ops on get_attr weights, one node a tensor, inputs chosen by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from mono_quant_fx import graph
from mono_quant_fx.errors import CaptureError
from mono_quant_fx.weight_ops import is_assertion
from mono_quant_fx.weight_table import WEIGHT_MODULES


class TensorProxy(fx.Proxy):
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
    """

    def __init__(self, inputs: list[str] | None = None):
        super().__init__()
        self.inputs = inputs
        self.record_stack_traces = True
        self._names: dict[int, str] = {}
        self._proxies: dict[str, fx.Proxy] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """See torch.fx.Tracer.trace."""
        for name, tensor in graph.named_tensors(root):
            self._names.setdefault(id(tensor), name)
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Weight modules are opened; the rest of torch.nn stays whole, as in torch.fx."""
        return type(m) not in WEIGHT_MODULES and super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A transposed convolution asked for an output size computes with sizes, so that it stays a leaf."""
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
        return lambda root: root.forward(**proxies), [self.root]  # the instance's own forward, where it has one

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


def trace(model: nn.Module, inputs: list[str] | None = None) -> fx.GraphModule:
    """Symbolic tracing with QuantTracer, of a twin: what tracing and forward leave on a module stays there."""
    model = twin(model)
    gm = fx.GraphModule(model, QuantTracer(inputs).trace(model))
    for target in graph.attribute_targets(gm):
        if not graph.is_persistent(model, target):  # torch.fx registers every buffer as a persistent one
            graph.attach(gm, target, graph.get_attribute(gm, target), persistent=False)
    return normalize(gm)


def twin(model: nn.Module) -> nn.Module:
    """A deep copy that shares every parameter and buffer; the model itself where it cannot be copied."""
    try:
        return copy.deepcopy(model, {id(t): t for _, t in graph.named_tensors(model)})
    except Exception:
        return model


def normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """One get_attr node a tensor, in a clone without the tracer's leftovers, in eval mode."""
    gm = graph.clone(gm).train(False)
    first: dict[Any, fx.Node] = {}
    for node in list(gm.graph.nodes):
        tensor = graph.get_tensor(gm, node)
        if tensor is None:
            continue
        same = first.setdefault(_identity(tensor), node)
        for user in [u for u in node.users if is_assertion(u)]:
            gm.graph.erase_node(user)  # it asserts what is known of a constant
        if same is not node:
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
    graph.drop_unused(gm)
    gm.recompile()
    return gm


def _identity(tensor: Tensor) -> Any:
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def open_modules(gm: fx.GraphModule) -> fx.GraphModule:
    """Replaces each call of a weight module by what its forward does, and returns a normalized clone."""
    gm = graph.clone(gm)
    for node in list(gm.graph.nodes):
        module = graph.get_attribute(gm, node.target) if node.op == "call_module" else None
        if type(module) in WEIGHT_MODULES and not (isinstance(module, _ConvTransposeNd) and len(_given(node)) > 1):
            _open(gm, node, module)  # type: ignore[arg-type]
    return normalize(gm)


def _given(call: fx.Node) -> tuple[Any, ...]:
    return (*call.args, *call.kwargs.values())


def _open(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    bound = inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments
    inner = QuantTracer(list(bound)).trace(module)
    values = {n: bound[str(n.target)] for n in inner.nodes if n.op == "placeholder"}
    last = node.prev
    with gm.graph.inserting_before(node):
        result = gm.graph.graph_copy(inner, values)
    while node.prev is not last:
        last = last.next
        _adopt(last, node, module)
    node.replace_all_uses_with(result)  # type: ignore[arg-type]
    gm.graph.erase_node(node)


def _adopt(new: fx.Node, call: fx.Node, module: nn.Module) -> None:
    path = str(call.target)
    if new.op == "get_attr":
        new.target = f"{path}.{new.target}"
    stack = dict(call.meta.get("nn_module_stack") or {})
    stack[path] = (path, type(module))
    new.meta = {**call.meta, "nn_module_stack": stack}
