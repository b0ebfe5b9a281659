"""JSON data as a GraphModule. torch.fx turns a graph into Python source, so every name in it is checked first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo

from mono_quant_fx.errors import GraphFormatError
from mono_quant_fx.frontend.guards import GuardsFn
from mono_quant_fx.graph.annotation import QuantAnnotation, set_annotation
from mono_quant_fx.graph.own_names import is_name
from mono_quant_fx.graph.provenance import Step
from mono_quant_fx.graph.tensors import HISTORY, attach, get_attribute, named_tensors
from mono_quant_fx.storage.graph_json.call_checks import check_call, check_method
from mono_quant_fx.storage.graph_json.calls import function_of
from mono_quant_fx.storage.graph_json.containers import tree_from_json
from mono_quant_fx.storage.graph_json.leaf_modules import leaf_from_json
from mono_quant_fx.storage.graph_json.names import RESERVED, above, check_path, targets_of
from mono_quant_fx.storage.graph_json.tensors import TensorTable
from mono_quant_fx.storage.graph_json.values import fields, items, need, record_from_json, show, value_from_json, within
from mono_quant_fx.storage.graph_json.writer import FORMAT, VERSION
from mono_quant_fx.storage.graph_json.writes import through_from_json

_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
#: Graphs inside graphs: a no_grad block in an autocast block in a guard is three.
_MAX_GRAPHS = 8


@dataclass
class Reader:
    """What all graphs of one document share."""

    tensors: TensorTable
    stacks: list[dict[str, tuple[str, str]]] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def of(cls, data: Any, tensors: Mapping[str, Tensor]) -> tuple[Reader, Any]:
        """A reader of the document, and the document's graph."""
        fields(data, "the document", "format version tensors tied stacks traces steps graph")
        need(data["format"] == FORMAT, "the format", data["format"], f"{FORMAT!r} is read here")
        known = type(data["version"]) is int and data["version"] == VERSION
        need(known, "the version", data["version"], f"version {VERSION} is read here; update mono_quant_fx")
        stacks = [_stack(stack) for stack in items(data["stacks"], "stacks")]
        traces = items(data["traces"], "traces")
        need(all(type(t) is str for t in traces), "traces", traces, "they are strings")
        steps = [record_from_json(Step, step, "a step") for step in items(data["steps"], "steps")]
        return cls(TensorTable.of(data["tensors"], data["tied"], tensors), stacks, traces, steps), data["graph"]

    def graph(self, data: Any, prefix: str = "", depth: int = 0) -> fx.GraphModule:
        """A graph and all that it needs, in eval mode."""
        need(depth <= _MAX_GRAPHS, "the depth of graphs inside graphs", depth, f"{_MAX_GRAPHS} is the most")
        fields(data, "a graph", "nodes modules codegen")
        records = items(data["nodes"], "a graph's nodes")
        gm = fx.GraphModule(nn.Module(), fx.Graph())
        modules = self._modules(data["modules"], prefix, depth)
        self._attach(gm, targets_of(records), modules, prefix)
        new = self._nodes(records, gm)
        new._codegen = _codegen(data["codegen"], new)
        gm.graph = new
        new.lint()
        return gm.eval()

    def _modules(self, data: Any, prefix: str, depth: int) -> dict[str, nn.Module]:
        need(isinstance(data, dict), "modules", data, "an object is needed")
        built = {}
        for path, record in data.items():
            with within(f"module {show(path)}"):
                check_path(path, "its path")
                need(not above(path, data), "its path", path, "it lies inside another stored module")
                built[path] = self._module(record, f"{prefix}{path}.", depth)
        return built

    def _module(self, record: Any, prefix: str, depth: int) -> nn.Module:
        for kind in ("graph", "guards"):
            if isinstance(record, dict) and kind in record:
                inner = self.graph(fields(record, "it", kind)[kind], prefix, depth + 1)
                return inner if kind == "graph" else GuardsFn(inner)
        if isinstance(record, dict) and "through" in record:
            return through_from_json(record)
        names = self.tensors.below(prefix)
        module = leaf_from_json(record, len(names))
        wanted = {name: tuple(t.shape) for name, t in named_tensors(module)}
        need(wanted.keys() == set(names), "its tensors", sorted(names), f"its class has {sorted(wanted)}")
        for name in names:
            tensor, persistent = self.tensors.take(prefix + name)
            need(
                tuple(tensor.shape) == wanted[name], f"{name}'s shape", tuple(tensor.shape), f"{wanted[name]} is needed"
            )
            owner = get_attribute(module, name.rpartition(".")[0]) if "." in name else module
            is_parameter = name.rpartition(".")[2] in owner._parameters
            need(isinstance(tensor, nn.Parameter) is is_parameter, name, tensor.dtype, "parameters stay parameters")
            attach(module, name, tensor, persistent)
        return module

    def _attach(self, gm: fx.GraphModule, targets: list[str], modules: dict[str, nn.Module], prefix: str) -> None:
        """Puts what the nodes read where they read it, in the order of the nodes."""
        read = set()
        for target in targets:
            with within(f"target {show(target)}"):
                check_path(target, "the path")
                need(not above(target, set(targets) - modules.keys()), "the path", target, "a part of it is a tensor's")
                home = target if target in modules else above(target, modules)
                if not home:
                    tensor, persistent = self.tensors.take(prefix + target)
                    attach(gm, target, tensor, persistent)
                    continue
                if home not in read:
                    attach(gm, home, modules[home])
                    read.add(home)
                inside = dict(named_tensors(modules[home])) | dict(modules[home].named_modules())
                inner = target[len(home) + 1 :]
                need(inner in inside, "the path", target, f"the module {home} has no such part")
        need(len(read) == len(modules), "a module", [m for m in modules if m not in read], "no node reads it")

    def _nodes(self, records: list[Any], gm: fx.GraphModule) -> fx.Graph:
        new = fx.Graph()
        nodes: dict[str, fx.Node] = {}
        for i, record in enumerate(records):
            name = record.get("name") if isinstance(record, dict) else None
            with within(f"node {show(name)}" if isinstance(name, str) else f"node number {i}"):
                fields(record, "it", "name op", "target args kwargs annotation stack trace history")
                need(record["op"] in _OPS, "its op", record["op"], f"one of {', '.join(_OPS)} is needed")
                last = i == len(records) - 1
                need((record["op"] == "output") is last, "its op", record["op"], "the last node is the one output")
                node = self._node(new, record, nodes, gm)
                self._meta(node, record)
                nodes[node.name] = node
        need(bool(records), "a graph's nodes", records, "there is at least an output")
        return new

    def _node(self, new: fx.Graph, record: dict[str, Any], nodes: dict[str, fx.Node], gm: fx.GraphModule) -> fx.Node:
        name, op = record["name"], record["op"]
        need(is_name(name) and name not in RESERVED, "its name", name, "it is a Python name of up to 200 letters")
        need(name not in nodes, "its name", name, "another node has it")
        args = tuple(value_from_json(a, nodes) for a in items(record.get("args", []), "its args"))
        given = record.get("kwargs", {})
        names = isinstance(given, dict) and all(map(is_name, given))
        need(names, "its kwargs", given, "an object whose keys are Python names is needed")
        kwargs = {k: value_from_json(v, nodes) for k, v in given.items()}
        target = _resolve(op, record.get("target", "output"), args, kwargs, gm, nodes)
        node = new.create_node(op, target, args, kwargs, name)
        need(node.name == name, "its name", name, "torch.fx keeps the name for something else")
        return node

    def _meta(self, node: fx.Node, record: dict[str, Any]) -> None:
        if "stack" in record:
            node.meta["nn_module_stack"] = dict(_at(self.stacks, record["stack"], "its stack"))
        if "trace" in record:
            node.meta["stack_trace"] = _at(self.traces, record["trace"], "its trace")
        if "annotation" in record:
            set_annotation(node, record_from_json(QuantAnnotation, record["annotation"], "an annotation"))
        if "history" in record:
            numbers = items(record["history"], "its history")
            node.meta[HISTORY] = tuple(_at(self.steps, number, "its history") for number in numbers)


def _at(table: list[Any], index: Any, what: str) -> Any:
    need(type(index) is int and 0 <= index < len(table), what, index, f"it is an index below {len(table)}")
    return table[index]


def _stack(data: Any) -> dict[str, tuple[str, str]]:
    stack = {}
    for i, entry in enumerate(items(data, "a stack")):
        texts = isinstance(entry, list) and len(entry) == 2 and all(type(t) is str for t in entry)
        need(texts, "an entry of a stack", entry, "it is a list of a path and a class name")
        stack[entry[0] if entry[0] not in stack else f"{entry[0]}@{i}"] = (entry[0], entry[1])
    return stack


def _resolve(
    op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gm: fx.GraphModule, nodes: dict[str, fx.Node]
) -> Any:
    """The target of a node; GraphFormatError unless it and the arguments are what its op takes."""
    if op == "call_function":
        function = function_of(target)
        check_call(function, args, kwargs)
        return function
    if op == "call_method":
        check_method(target, args, kwargs)
        return target
    if op == "call_module":
        need(isinstance(get_attribute(gm, target), nn.Module), "its target", target, "it is no module")
        return target
    sizes = {"placeholder": (0, 1), "get_attr": (0,), "output": (1,)}[op]
    need(
        len(args) in sizes and not kwargs, "its arguments", [*args, *kwargs.items()], f"{op} takes {sizes[-1]} at most"
    )
    if op == "output":
        need(target == "output", "its target", target, "it is output, or left out")
    if op == "placeholder":
        need(isinstance(target, str), "its target", target, "it is the name of a parameter of forward")
        bare = target[len(target) - len(target.lstrip("*")) :]
        need(len(target) - len(bare) <= 2 and is_name(bare), "its target", target, "it is no name of a parameter")
        others = {str(n.target).lstrip("*") for n in nodes.values() if n.op == "placeholder"}
        need(bare not in RESERVED | others, "its target", target, "the code of the graph uses it for something else")
        need(not any(True for a in args for _ in _nodes_in(a)), "its default", args, "it depends on no node")
    return target


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


def _codegen(data: Any, new: fx.Graph) -> CodeGen:
    if data is None:
        return CodeGen()
    fields(data, "codegen", "arguments inputs outputs")
    names = items(data["arguments"], "codegen's arguments")
    plain = all(is_name(n) and n not in RESERVED for n in names)
    need(plain and len(set(names)) == len(names), "codegen's arguments", names, "they are different Python names")
    inputs = tree_from_json(data["inputs"])
    outputs = None if data["outputs"] is None else tree_from_json(data["outputs"])
    placeholders = [n for n in new.nodes if n.op == "placeholder"]
    # torch.fx cuts such a line at the first colon, even inside a string
    simple = [n for n in placeholders if n.args or not is_name(n.target)]
    need(not simple, "a default or a star", simple[:1], "forward takes its inputs through codegen, without either")
    need(inputs.num_leaves == len(placeholders), "codegen's inputs", data["inputs"], "one leaf for each placeholder")
    need(inputs.type in (tuple, list), "codegen's inputs", data["inputs"], "the outermost container is a tuple")
    top = [inputs.child(i) for i in range(inputs.num_children)]
    count = len(top)
    if inputs.type is tuple and count == 2 and top[0].type is tuple and top[1].type is dict:
        keys = top[1].context
        need(all(map(is_name, keys)), "codegen's keywords", keys, "they are Python names")  # written as they are
        count = top[0].num_children + len(keys)
    need(len(names) == count, "codegen's arguments", names, f"{count} are needed by its inputs")
    result = new.output_node().args[0]
    if outputs is not None:
        fits = isinstance(result, tuple | list) and len(result) == outputs.num_leaves
        need(fits, "codegen's outputs", data["outputs"], "one leaf for each value that the output node returns")
    return _PyTreeCodeGen(_PyTreeInfo(names, inputs, outputs))


def finish(read: Reader) -> None:
    """Raises GraphFormatError if a tensor was stored that nothing reads."""
    unused = read.tensors.unused()
    if unused:
        raise GraphFormatError(f"the tensor {unused[0]} is stored, and no node or module reads it")
