"""Whether a pass changed a graph: everything that it computes with, or says, as something that can be compared.

Tensors count by the memory that they are and by how often that was written, never by value, so that a fingerprint costs
the same for large weights. A fingerprint holds for as long as what it was taken from lives.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from mono_quant_fx.graph.tensors import HISTORY, attribute_targets, get_attribute, is_persistent, named_tensors

_PLAIN = (str, bytes, bool, int, float, complex, type(None), type(Ellipsis))
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)
#: By identity: a copy has the very same ones.
_SHARED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch._ops.OpOverload)
#: What every module has; the rest of its __dict__ are its own attributes.
_COMMON = frozenset(vars(nn.Module())) - {"training"}
_DEPTH = 8


class NodeToken(NamedTuple):
    """A node: all of it but how it came about (its history)."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    type: str
    meta: tuple[tuple[Any, Any], ...]


class TensorToken(NamedTuple):
    """A tensor by the memory that it shows, and how."""

    kind: str
    memory: Any
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    version: int
    requires_grad: bool

    @property
    def place(self) -> tuple[Any, ...]:
        """All but whether it requires a gradient."""
        return self[:-1]


class Fingerprint(NamedTuple):
    """Equal for two GraphModules that compute the same by the same nodes, say the same of them, and share tensors.

    Attributes:
        nodes: in execution order.
        tensors: name -> token, and whether the state_dict has it; sorted by name.
        modules: each module's class, mode and attributes, sub-graphs included; sorted by name.
        rest: the graph module's own meta, mode and calling convention.
    """

    nodes: tuple[NodeToken, ...]
    tensors: tuple[tuple[str, TensorToken, bool], ...]
    modules: tuple[tuple[str, Any], ...]
    rest: Any


def fingerprint(gm: fx.GraphModule) -> Fingerprint:
    """Of a graph module as it is now."""
    codegen = gm.graph._codegen
    return _fingerprint(gm, (token(gm.meta), type(codegen), token(vars(codegen))))


def _fingerprint(gm: fx.GraphModule, rest: Any) -> Fingerprint:
    values = {target: get_attribute(gm, target) for target in attribute_targets(gm)}
    tensors = {name: t for name, t in values.items() if isinstance(t, Tensor)} | dict(named_tensors(gm))
    modules = {name: _module(m) for name, m in gm.named_modules(remove_duplicate=False) if name}
    modules |= {name: _state(v, _DEPTH) for name, v in values.items() if not isinstance(v, Tensor | nn.Module)}
    return Fingerprint(
        tuple(node_token(n) for n in gm.graph.nodes),
        tuple((name, tensor_token(tensors[name]), is_persistent(gm, name)) for name in sorted(tensors)),
        tuple((name, modules[name]) for name in sorted(modules)),
        (gm.training, rest),
    )


def node_token(node: fx.Node) -> NodeToken:
    """Of one node."""
    target = node.target if isinstance(node.target, str) else id(node.target)
    meta = tuple((k, token(v)) for k, v in node.meta.items() if k != HISTORY)
    return NodeToken(node.op, node.name, target, token(node.args), token(node.kwargs), repr(node.type), meta)


def tensor_token(t: Tensor) -> TensorToken:
    """Of one tensor; one without storage counts as itself."""
    try:
        memory, offset, stride = t.untyped_storage()._cdata, int(t.storage_offset()), t.stride()
    except (NotImplementedError, RuntimeError):
        memory, offset, stride = id(t), 0, ()
    version = 0 if t.is_inference() else t._version
    return TensorToken(
        type(t).__name__, memory, offset, t.dtype, tuple(t.shape), tuple(stride), version, t.requires_grad
    )


def token(value: Any) -> Any:
    """A value as something hashable: plain data by its text, containers by what is in them, the rest by identity."""
    kind = type(value)
    if kind is str:
        return value
    if kind in _PLAIN:
        return kind, repr(value)
    if isinstance(value, fx.Node):
        return "node", value.name
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return tensor_token(value)
    if isinstance(value, _NAMED):
        return repr(value)
    parts = _parts(value)
    return id(value) if parts is None else (kind, *map(token, parts))


def _parts(value: Any) -> Any:
    """What is in a container or a dataclass, in order; None for what is neither."""
    if isinstance(value, tuple | list):
        return value
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def _module(module: nn.Module) -> Any:
    if isinstance(module, fx.GraphModule):  # a copy of it has other objects for its meta and calling convention
        return _fingerprint(module, _state((module.meta, module.graph._codegen), _DEPTH))
    own = {k: v for k, v in vars(module).items() if k not in _COMMON}
    if len(own) == 1 and not any(getattr(module, hooks) for hooks in _HOOKS):
        return type(module).__qualname__, module.training
    return type(module).__qualname__, _state(own, _DEPTH), _state([getattr(module, hooks) for hooks in _HOOKS], _DEPTH)


_HOOKS = tuple(sorted(name for name in _COMMON if name.endswith("_hooks")))


def _state(value: Any, depth: int) -> Any:
    """A value by what it holds, so that a deep copy of it counts as equal."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, repr(value)
    if isinstance(value, _NAMED):
        return repr(value)
    if isinstance(value, _SHARED):
        return id(value)
    if not depth:
        return kind
    if isinstance(value, Tensor):
        return kind, value.dtype, tuple(value.shape), value.requires_grad, _digest(value)
    if isinstance(value, types.MethodType):
        return kind, id(value.__func__)
    parts = _parts(value)
    inner = getattr(value, "__dict__", None) if parts is None else parts
    return kind if inner is None else (kind, *(_state(part, depth - 1) for part in _parts(inner)))


def _digest(t: Tensor) -> bytes:
    """Of a tensor's values; of one without values, nothing."""
    if t.is_meta or isinstance(t, FakeTensor) or t.layout != torch.strided or not t.numel():
        return b""
    flat = t.detach().cpu().contiguous()
    return hashlib.sha256(ctypes.string_at(flat.data_ptr(), flat.nbytes)).digest()
