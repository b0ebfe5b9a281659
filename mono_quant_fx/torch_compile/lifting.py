"""Dynamo's graphs: weights that came as inputs become constants, which passes understand, and codes become inputs.

Dynamo lifts the parameters and buffers of modules to inputs of the graph and marks those inputs; the module still owns
the tensors, and a call hands them over again. So nothing is baked in here either: the float weight leaves the graph,
and its codes come in as an input in its stead.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from mono_quant_fx.graph import tensors

#: In an input's meta["tensor_dict"], where Dynamo marks what belongs to a module.
STATIC = "_dynamo_static_input_type"
_ROOT = re.compile(r"[LG]\['(\w+)'\]")
#: How Dynamo spells an attribute of a module whose class has a __getattr__ or __setattr__ of its own.
_DICT = re.compile(r"\.__dict__\['(\w+)'\]")
_KEY = r"""\[(?:'([^']*)'|"([^"]*)")\]"""
_STEP = re.compile(rf"\._(?:modules|parameters|buffers){_KEY}|\.(\w+)|{_KEY}|\[(\d+)\]")


@dataclass(frozen=True)
class Lifted:
    """A graph whose weights are constants: `inputs` tells from which input of Dynamo's graph each one came."""

    graph_module: fx.GraphModule
    inputs: dict[str, int]


@dataclass(frozen=True)
class Rebound:
    """A graph for the next backend: its inputs are those at `kept` of Dynamo's graph, then the `constants` by name."""

    graph_module: fx.GraphModule
    kept: tuple[int, ...]
    constants: tuple[str, ...]


class Names:
    """What Dynamo's sources and module stacks are called in the user's terms: L['self']._modules['fc'] is fc.

    A variable that all weights of the graph come from is left out, so that names are those of state_dict(). In a frame
    that begins in a submodule they begin there; with `model` they are the names that the tensors have in it.
    """

    def __init__(self, sources: Sequence[str], model: nn.Module | None = None):
        roots = {m[1] for m in map(_ROOT.match, sources) if m}
        self._is_rooted = len(roots) > 1
        self._tensors = {} if model is None else {id(t): n for n, t in reversed([*tensors.named_tensors(model)])}
        self._modules = {} if model is None else {str(id(m)): n for n, m in model.named_modules()}

    def tensor(self, source: str, tensor: Tensor) -> str:
        """The name of the tensor that `source` spells."""
        return self._tensors.get(id(tensor)) or self._path(source)

    def module(self, key: str, path: str) -> str:
        """The path of a module, by its entry in nn_module_stack."""
        return self._modules.get(key.partition("@")[0], self._path(path))

    def _path(self, text: str) -> str:
        root = _ROOT.match(text)
        rest = _DICT.sub(r".\1", re.sub(r"@\d+", "", text[root.end() if root else 0 :]))
        if root is None or _STEP.sub("", rest):  # some other expression: still a name, if a clumsy one
            return re.sub(r"\W+", "_", text).strip("_")
        steps = ["".join(found) for found in _STEP.findall(rest)]
        return ".".join([root[1], *steps] if self._is_rooted else steps)


#: What every module has, so that no tensor can be put under that name.
_BARE = nn.Module()


def _attachable(name: str) -> str:
    """The name with each step as something that a module can be given, and that a graph's code can spell."""
    steps = re.sub(r"""["'\\\n\r]""", "_", name).split(".")
    return ".".join(f"{step}_" if _is_taken(step) else step for step in steps)


def _is_taken(step: str) -> bool:
    return not step or keyword.iskeyword(step) or hasattr(_BARE, step)


def lift(gm: fx.GraphModule, example_inputs: Sequence[Any], model: nn.Module | None = None) -> Lifted:
    """A clone of Dynamo's graph in which each float parameter or buffer of a module is one get_attr node.

    The inputs that they came by stay where they are, unused. `model` gives the names (see Names).
    """
    static = {n.name: (i, _source(n), t) for i, n, t in _static(gm, example_inputs)}
    names = Names([source for _, source, _ in static.values()], model)
    twin = tensors.clone(gm)
    inputs: dict[str, int] = {}
    last = _placeholders(twin)[-1] if static else None
    for node in list(twin.graph.nodes):
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {k: (names.module(k, path), kind) for k, (path, kind) in stack.items()}
        node.meta.pop("grapharg", None)  # it holds the tensor
        if node.op == "placeholder" and node.name in static and last is not None:
            position, source, tensor = static[node.name]
            name = _free(_attachable(names.tensor(source, tensor)), inputs)
            inputs[name] = position
            tensors.attach(twin, name, tensor)
            with twin.graph.inserting_after(last):
                last = constant = twin.graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
    twin.recompile()
    return Lifted(twin, inputs)


def rebind(gm: fx.GraphModule, lifted: Lifted, original: fx.GraphModule, codes: Sequence[str]) -> Rebound:
    """Undoes lift in place: what is float comes by its old input again, and `codes`, constants of gm, by new ones."""
    inputs, nodes = lifted.inputs, _placeholders(gm)
    last = nodes[-1]
    constants: dict[str, Tensor] = {}
    for node in [n for n in gm.graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        if name in codes:  # first: codes of INT8 have the weight's own name
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(f"codes_{len(constants)}")
            last.meta = {"tensor_dict": {STATIC: "unguarded"}}
            constants[name] = tensors.get_attribute(gm, name)
            node.replace_all_uses_with(last)
        elif name in inputs:
            node.replace_all_uses_with(nodes[inputs[name]])
        else:
            continue
        gm.graph.erase_node(node)
    unused = [i for i in inputs.values() if not nodes[i].users]
    for i in unused:
        gm.graph.erase_node(nodes[i])
    kept = tuple(i for i in range(len(nodes)) if i not in unused)
    _mark_as_dynamos(gm, original, kept)
    tensors.drop_unused(gm)
    gm.graph.lint()
    gm.recompile()
    return Rebound(gm, kept, tuple(constants))


def _mark_as_dynamos(gm: fx.GraphModule, original: fx.GraphModule, kept: tuple[int, ...]) -> None:
    """Carries over what Dynamo notes beside meta: by it AOTAutograd guards inputs that overlap in memory."""
    sources = [getattr(n, "_dynamo_source", None) for n in _placeholders(original)]
    nodes = _placeholders(gm)
    for node, i in zip(nodes, [*kept, *[None] * (len(nodes) - len(kept))], strict=True):
        node._dynamo_source = None if i is None else sources[i]  # type: ignore[attr-defined]
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(original, name):
            setattr(gm, name, getattr(original, name))


def _static(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Iterator[tuple[int, fx.Node, Tensor]]:
    for i, (node, value) in enumerate(zip(_placeholders(gm), example_inputs, strict=True)):
        marks = node.meta.get("tensor_dict") or {}
        if isinstance(value, Tensor) and value.is_floating_point() and marks.get(STATIC):
            yield i, node, value


def _source(node: fx.Node) -> str:
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    return node.name if source is None else str(source.name)


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def _free(name: str, taken: dict[str, int]) -> str:
    """`name`, or with a number where another tensor has it, and under a prefix where GraphModule has it."""
    name = f"model.{name}" if hasattr(fx.GraphModule, name.partition(".")[0]) or name.startswith("meta.") else name
    free, number = name, 1
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free
