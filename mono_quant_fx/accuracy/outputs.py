"""What a graph returns, one figure an output: by name, and whether it depends on a quantized weight at all."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from mono_quant_fx.errors import CalibrationError
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.graph.state import written
from mono_quant_fx.numerics.error import ErrorSum
from mono_quant_fx.ops.registry import is_ours

aten = torch.ops.aten
#: What these give is known from a tensor's shape and type alone.
_SHAPES = {"size", "dim", "numel", "ndimension", "stride", aten.sym_size.int, aten.sym_numel.default}
_SHAPE_ATTRIBUTES = {"shape", "dtype", "device", "ndim"}


@dataclass(frozen=True)
class OutputFigure:
    """One output of the model, over all that was measured.

    Attributes:
        name: dict keys, dataclass fields and places in tuples, joined by dots; "output" for a model's only one.
        depends: whether it is computed from a quantized weight. What is not passes by untouched.
        sqnr_db, max_abs_error: None for an output that holds no floating-point numbers.
        agreement: the share of equal elements, for such an output; else None.
    """

    name: str
    depends: bool
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        if not self.depends:
            return f"{self.name}: depends on no quantized weight"
        if self.sqnr_db is not None:
            return f"{self.name}: {self.sqnr_db:.1f} dB, max err {self.max_abs_error:.2g}"
        return f"{self.name}: {100 * (self.agreement or 0.0):.2f}% of the elements are equal"


def headline(figures: tuple[OutputFigure, ...]) -> float | None:
    """The SQNR of the worst output that depends on a quantized weight; None where none has one."""
    found = [figure.sqnr_db for figure in figures if figure.depends and figure.sqnr_db is not None]
    return min(found, default=None)


def why_none(figures: tuple[OutputFigure, ...]) -> str:
    """Why measured outputs have no headline, in words."""
    told = [str(figure) for figure in figures if figure.depends]
    if not told:
        return "no output depends on a quantized weight"
    return f"no floating-point output depends on a quantized weight ({'; '.join(told)})"


class OutputSums:
    """Sums over batches of what two versions of one graph return."""

    def __init__(self, quantized: fx.GraphModule):
        (node,) = [n for n in quantized.graph.nodes if n.op == "output"]
        self.structure, self.names = node.args[0], _flat_names(quantized)
        self.dependent = dependent_nodes(quantized)
        self.found: dict[tuple[str, int], _Sum] = {}

    def add(self, expected: Any, actual: Any) -> None:
        """Adds the outputs of one batch.

        Raises:
            CalibrationError: the two differ in shapes.
        """
        pairs, seen = zip(self._named(expected), self._named(actual), strict=True), Counter[str]()
        for (name, node, a), (_, _, b) in pairs:
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                depends = node is not None and self.dependent[node]
                self.found.setdefault((name, seen[name]), _Sum(depends)).add(a, b)
                seen[name] += 1  # the keys 1 and "1" are two outputs, and so are {"a": {"b": ...}} and {"a.b": ...}

    def figures(self) -> tuple[OutputFigure, ...]:
        """Of every tensor among the outputs, in order."""
        return tuple(total.figure(f"{name}#{i + 1}" if i else name) for (name, i), total in self.found.items())

    def _named(self, value: Any) -> Iterator[tuple[str, fx.Node | None, Any]]:
        for path, node, leaf in _pair(self.structure, value, ()):
            yield self._name(path), node, leaf

    def _name(self, path: tuple[str, ...]) -> str:
        if self.names is not None and path:
            path = (self.names[int(path[0])], *path[1:])
        return ".".join(part for part in path if part) or "output"


@dataclass
class _Sum:
    depends: bool
    error: ErrorSum = field(default_factory=ErrorSum)
    equal: int = 0
    count: int = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        if a.shape != b.shape:
            raise CalibrationError(f"the graphs disagree on a shape: {tuple(a.shape)} and {tuple(b.shape)}")
        if a.is_complex() and b.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        if a.is_floating_point():
            self.error.add(a, b)
        else:
            self.equal, self.count = self.equal + int((a == b).sum()), self.count + a.numel()

    def figure(self, name: str) -> OutputFigure:
        if self.error.batches:
            return OutputFigure(name, self.depends, self.error.sqnr_db, self.error.max_abs)
        return OutputFigure(name, self.depends, agreement=self.equal / max(1, self.count))


def dependent_nodes(gm: fx.GraphModule) -> dict[fx.Node, bool]:
    """Which values are computed from a weight that is quantized, or planned to be, through written state too."""
    sources = {n for n, annotation in annotated(gm) if annotation.scheme is not None}
    found = _spread(gm, sources)
    state = {str(n.target) for n in written(gm) if any(found[user] for user in n.users)}
    if state:
        found = _spread(gm, sources | {n for n in gm.graph.nodes if n.op == "get_attr" and str(n.target) in state})
    return found


def _spread(gm: fx.GraphModule, sources: set[fx.Node]) -> dict[fx.Node, bool]:
    found: dict[fx.Node, bool] = {}
    for node in gm.graph.nodes:
        reads = any(found[a] for a in node.all_input_nodes) and not _reads_shape(node)
        found[node] = node in sources or is_ours(node.target) or reads
    return found


def _reads_shape(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return node.target in _SHAPES if isinstance(node.target, str | torch._ops.OpOverload) else False


def _flat_names(gm: fx.GraphModule) -> list[str] | None:
    """The outputs' names where the graph returns a flat list that its code puts into a structure; else None."""
    codegen = gm.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen) or codegen.pytree_info.out_spec is None:
        return None
    spec = codegen.pytree_info.out_spec
    try:
        tree = pytree.tree_unflatten([_Place(i) for i in range(spec.num_leaves)], spec)
    except Exception:  # a class of the user's may check what it is made of
        return [str(i) for i in range(spec.num_leaves)]
    names = {leaf.index: ".".join(path) for path, leaf in named_leaves(tree) if isinstance(leaf, _Place)}
    return [names.get(i, str(i)) for i in range(spec.num_leaves)]


@dataclass(frozen=True)
class _Place:
    """Stands for a flat output inside the structure that is returned."""

    index: int


def named_leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What a value holds, with the way there: keys, fields, places."""
    parts = _parts(value)
    if parts is None:
        yield path, value
        return
    for name, part in parts:
        yield from named_leaves(part, (*path, name))


def _pair(structure: Any, value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], fx.Node | None, Any]]:
    """(path, the graph's node, leaf) of a value that was returned for `structure`, an output node's argument."""
    parts = _made_of(structure) if isinstance(structure, fx.Node) else _parts(structure)
    values = _parts(value)
    if not parts or values is None or not {name for name, _ in values} <= {name for name, _ in parts}:
        node = structure if isinstance(structure, fx.Node) else None
        yield from ((way, node, leaf) for way, leaf in named_leaves(value, path))
        return
    sources = dict(parts)
    for name, own in values:
        yield from _pair(sources[name], own, (*path, name))


def _made_of(node: fx.Node) -> list[tuple[str, Any]]:
    """The fields of a dataclass that the node makes; nothing for every other node."""
    made = node.target
    if not (isinstance(made, type) and dataclasses.is_dataclass(made)):
        return []
    fields = [f.name for f in dataclasses.fields(made)]
    return [*zip(fields, node.args, strict=False), *node.kwargs.items()]


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """The named parts of a container; None for a leaf."""
    if isinstance(value, _Place | fx.Node | Tensor):
        return None
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(name, getattr(value, name)) for name in value._fields]
    if isinstance(value, tuple | list):
        return [(str(i), part) for i, part in enumerate(value)]
    found, spec = pytree.tree_flatten(value)
    return None if spec.is_leaf() else [(str(i), part) for i, part in enumerate(found)]
