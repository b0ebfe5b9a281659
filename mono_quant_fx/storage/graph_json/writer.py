"""A GraphModule as plain JSON data: nodes, calls by name, modules by class and arguments, tensors by name only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.graph import CodeGen, _PyTreeCodeGen

from mono_quant_fx.errors import GraphFormatError, NotSelfContainedError
from mono_quant_fx.files.json_records import to_plain
from mono_quant_fx.frontend.guards import GuardsFn, is_guards, trace_guards
from mono_quant_fx.functionalization.pure_writes import Through
from mono_quant_fx.graph.annotation import get_annotation
from mono_quant_fx.graph.provenance import Step, history
from mono_quant_fx.graph.tensors import get_attribute, is_persistent, module_stack, named_tensors
from mono_quant_fx.storage.graph_json.allowed_aten import WAYS_OUT
from mono_quant_fx.storage.graph_json.call_checks import check_call
from mono_quant_fx.storage.graph_json.calls import function_name, is_method
from mono_quant_fx.storage.graph_json.containers import tree_to_json
from mono_quant_fx.storage.graph_json.leaf_modules import check_hooks, leaf_to_json
from mono_quant_fx.storage.graph_json.values import DTYPES, value_to_json, within
from mono_quant_fx.storage.graph_json.writes import through_to_json

FORMAT, VERSION = "mono_quant_fx graph", 1


@dataclass
class Writer:
    """What has been written so far: each tensor under its first name, further names as ties, texts once."""

    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    stacks: dict[tuple[tuple[str, str], ...], int] = field(default_factory=dict)
    traces: dict[str, int] = field(default_factory=dict)
    steps: dict[Step, int] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    _first: dict[Any, str] = field(default_factory=dict)

    def write(self, gm: fx.GraphModule) -> dict[str, Any]:
        """The whole document."""
        if gm.training:
            raise NotSelfContainedError("the graph is in training mode; call .eval() on it first")
        check_hooks(gm, "the graph")
        written = self.graph(gm, "")
        return {
            "format": FORMAT,
            "version": VERSION,
            "tensors": self.tensors,
            "tied": self.tied,
            "stacks": [[list(entry) for entry in stack] for stack in self.stacks],
            "traces": list(self.traces),
            "steps": [to_plain(step, brief=True) for step in self.steps],
            "graph": written,
        }

    def graph(self, gm: fx.GraphModule, prefix: str) -> dict[str, Any]:
        """One graph; `prefix` is the path of its module, with a dot, in the outermost one."""
        modules: dict[str, Any] = {}
        nodes = []
        for node in gm.graph.nodes:
            with within(f"node {node.name!r}"):
                if node.op in ("get_attr", "call_module"):
                    self._attribute(gm, node, prefix, modules)
                nodes.append(self._node(node))
        return {"nodes": nodes, "modules": modules, "codegen": _codegen(gm.graph._codegen)}

    def _node(self, node: fx.Node) -> dict[str, Any]:
        record: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op != "output":
            record["target"] = _target(node)
        if node.args:
            record["args"] = [value_to_json(a) for a in node.args]
        if node.kwargs:
            record["kwargs"] = {k: value_to_json(v) for k, v in node.kwargs.items()}
        annotation = get_annotation(node)
        if annotation is not None:
            if annotation.stored is not None:
                raise NotSelfContainedError(
                    f"the codes of {annotation.weight} were found but not put into the graph; run "
                    "Int4GroupwiseLowering first"
                )
            record["annotation"] = to_plain(annotation, brief=True)
        if history(node):
            record["history"] = [self.steps.setdefault(step, len(self.steps)) for step in history(node)]
        stack = tuple(module_stack(node))
        if stack:
            record["stack"] = self.stacks.setdefault(stack, len(self.stacks))
        trace = node.meta.get("stack_trace")
        if isinstance(trace, str):
            record["trace"] = self.traces.setdefault(trace, len(self.traces))
        return record

    def _attribute(self, gm: fx.GraphModule, node: fx.Node, prefix: str, modules: dict[str, Any]) -> None:
        target = str(node.target)
        value = get_attribute(gm, target)
        if isinstance(value, Tensor):
            self._tensor(prefix + target, value, is_persistent(gm, target))
        elif not isinstance(value, nn.Module):
            raise NotSelfContainedError(
                f"it reads the attribute {target}, a {type(value).__qualname__}; only tensors and modules can be stored"
            )
        elif target not in modules and not _inside(target, modules):
            modules[target] = self._module(value, f"{prefix}{target}.", len(node.args))

    def _module(self, module: nn.Module, prefix: str, inputs: int) -> dict[str, Any]:
        check_hooks(module, prefix[:-1])
        if isinstance(module, GuardsFn):
            return {"guards": self.graph(module.checks, prefix)}
        if is_guards(module):
            return {"guards": self.graph(trace_guards(module, inputs), prefix)}
        if isinstance(module, fx.GraphModule):
            return {"graph": self.graph(module, prefix)}
        if isinstance(module, Through):
            return through_to_json(module)
        record = leaf_to_json(module)
        for name, tensor in named_tensors(module):
            self._tensor(prefix + name, tensor, is_persistent(module, name))
        return record

    def _tensor(self, name: str, tensor: Tensor, persistent: bool) -> None:
        if name in self.tensors or name in self.tied:
            return
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
        if not plain or str(tensor.dtype)[6:] not in DTYPES:
            raise NotSelfContainedError(
                f"the tensor {name} is a {type(tensor).__qualname__} of {tensor.layout}, {tensor.dtype}; "
                "only dense ones can be stored"
            )
        record = {
            "kind": "parameter" if isinstance(tensor, nn.Parameter) else "buffer",
            "persistent": persistent,
            "requires_grad": tensor.requires_grad,
            "dtype": str(tensor.dtype)[6:],
            "shape": list(tensor.shape),
        }
        first = self._first.setdefault((_identity(tensor), record["kind"], tensor.requires_grad, persistent), name)
        if first != name:
            self.tied[name] = first
        else:
            self.tensors[name], self.values[name] = record, tensor


def _inside(target: str, modules: dict[str, Any]) -> bool:
    parts = target.split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts)))


def _identity(tensor: Tensor) -> Any:
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _target(node: fx.Node) -> str:
    """What a node calls or reads, by name."""
    if node.op == "call_method" and not is_method(node.target):
        raise NotSelfContainedError(
            f"it calls the tensor method .{node.target}, which a stored graph may not call; compute it another way, or "
            "keep it outside the model"
        )
    if node.op != "call_function":
        return str(node.target)
    name = function_name(node.target)
    if name is None:
        raise NotSelfContainedError(
            f"it calls {_spelled(node.target)}, which a stored graph may not call: {_way_out(node.target)}"
        )
    try:
        check_call(node.target, node.args, dict(node.kwargs))
    except GraphFormatError as e:  # load would refuse what save wrote
        raise NotSelfContainedError(f"it calls {name}, and {e}") from e
    return name


def _spelled(target: Any) -> str:
    kind = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    return str(target) if isinstance(target, OpOverload) or None in kind else ".".join(map(str, kind))


def _way_out(target: Any) -> str:
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return (
            "only the plain functions of torch, operator and math can be found again by name; write it in terms of "
            'those, or capture with method="export"'
        )
    name = target._schema.name.removeprefix("aten::")
    return next(
        (way for names, way in WAYS_OUT.items() if name in names.split()),
        "a file from a stranger could reach memory that is not its own through it, or nobody has looked at it; compute "
        "it another way, or save without graph=True and load with the model",
    )


def _codegen(codegen: CodeGen) -> dict[str, Any] | None:
    """How forward takes its inputs and returns its outputs; None for plain arguments."""
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise NotSelfContainedError(
            f"the graph writes its forward with {type(codegen).__qualname__}; only torch.fx's own code and that of "
            "torch.export can be stored"
        )
    info = codegen.pytree_info
    return {
        "arguments": list(info.orig_args),
        "inputs": tree_to_json(info.in_spec, "input"),
        "outputs": None if info.out_spec is None else tree_to_json(info.out_spec, "output"),
    }
