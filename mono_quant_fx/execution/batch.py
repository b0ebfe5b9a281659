"""Batches: what a user hands over as example or calibration data, turned into a model's arguments."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from mono_quant_fx.errors import CalibrationError

Prepare = Callable[[Any], Any]


@dataclass(frozen=True)
class Batch:
    """The positional and keyword arguments of one call of the model; `number` is its place in the calibration data."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    number: int | None = None

    def names(self, model: nn.Module) -> list[str]:
        """The names of forward's parameters that this batch gives.

        Raises:
            CalibrationError: the batch does not fit forward; shows both signatures and names prepare_batch.
        """
        bound = self._bound(model).arguments
        kinds = inspect.signature(model.forward).parameters
        if any(kinds[name].kind is inspect.Parameter.VAR_POSITIONAL for name in bound):
            raise CalibrationError("forward takes *args, which have no names")
        named = {n: v for n, v in bound.items() if kinds[n].kind is not inspect.Parameter.VAR_KEYWORD}
        extra = [k for n, v in bound.items() if kinds[n].kind is inspect.Parameter.VAR_KEYWORD for k in v]
        return [*named, *extra]

    def bind(self, gm: fx.GraphModule) -> list[Any]:
        """The values of gm's placeholders, in order; nested containers flattened where the graph wants it.

        Raises:
            CalibrationError: the batch does not fit.
        """
        bound = self._bound(gm)
        bound.apply_defaults()
        values = {n: v for n, v in bound.arguments.items() if n != "self"}
        codegen = gm.graph._codegen
        if not isinstance(codegen, _PyTreeCodeGen) or codegen.pytree_info.in_spec is None:
            return list(values.values())
        return self._flatten(values, codegen.pytree_info.in_spec, list(codegen.pytree_info.orig_args))

    def _flatten(self, values: dict[str, Any], spec: pytree.TreeSpec, names: list[str]) -> list[Any]:
        """The leaves in the order of an exported graph, whose dicts may have their keys in another order."""
        args, kwargs = pytree.tree_unflatten([None] * spec.num_leaves, spec)
        positional = tuple(values[n] for n in names[: len(args)])
        try:
            leaves = spec.flatten_up_to((positional, {n: values[n] for n in kwargs}))
        except ValueError as e:
            reason = str(e).partition("\n")[0]
            raise CalibrationError(f"{self.label} does not have the example's structure: {reason}; {_REMEDY}") from e
        nested = [v for v in leaves if isinstance(v, tuple | list | dict)]
        if nested:
            raise CalibrationError(
                f"{self.label} does not have the example's structure: a {type(nested[0]).__name__} stands where the "
                f"example had a single value; {_REMEDY}"
            )
        return leaves

    def check_fits(self, model: nn.Module) -> None:
        """Raises CalibrationError unless forward takes these arguments; shows both signatures and a remedy."""
        self._bound(model)

    def in_order(self, model: nn.Module) -> Batch:
        """The same batch with its keywords in the order of forward's parameters."""
        order = {name: i for i, name in enumerate(inspect.signature(model.forward).parameters)}
        return Batch(self.args, dict(sorted(self.kwargs.items(), key=lambda item: order.get(item[0], len(order)))))

    def _bound(self, model: nn.Module) -> inspect.BoundArguments:
        signature = inspect.signature(model.forward)
        try:
            return signature.bind(*self.args, **self.kwargs)
        except TypeError as e:
            bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
            raise CalibrationError(f"{self.label} does not fit forward{inspect.Signature(bare)}: {e}; {_REMEDY}") from e

    @property
    def place(self) -> int:
        """Its number as errors say it: 0 for a batch outside of any data."""
        return self.number or 0

    @property
    def label(self) -> str:
        """How an error calls this batch: what it holds, and its place in the data."""
        return f"a batch {self}" if self.number is None else f"batch {self.number} {self}"

    def samples(self) -> int:
        """The size of dim 0 of the first tensor (1 if there is none with dimensions)."""
        return next((t.shape[0] for t in self.tensors() if t.dim()), 1)

    def rows(self, start: int, stop: int) -> Batch:
        """Samples start <= i < stop: of every tensor whose dim 0 is the sample count."""
        total = self.samples()
        return self.map_tensors(lambda t: t[start:stop] if t.dim() and t.shape[0] == total else t)

    def copied(self) -> Batch:
        """The same batch in memory of its own."""
        return self.map_tensors(torch.clone)

    def equals(self, other: Batch) -> bool:
        """Whether it holds the same values in the same places."""
        (own, spec), (others, other_spec) = (pytree.tree_flatten((b.args, b.kwargs)) for b in (self, other))
        return spec == other_spec and all(map(_equal, own, others))

    def fresh(self) -> Batch:
        """The same values in tensors of their own: contiguous, views of nothing, no two in one memory.

        What an export is given leaves traces in it otherwise: it reads the base of a view, and takes a tensor that is
        given for two inputs for one.
        """
        return self.map_tensors(_own)

    def private(self) -> Batch:
        """Copies for one run, whatever that writes: a tensor that is given twice stays one."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        args, kwargs = pytree.tree_unflatten(private(leaves), spec)
        return Batch(args, kwargs, self.number)

    def doubled(self) -> Batch | None:
        """A batch of one sample repeated to two, since torch.export freezes a size of one; None when it has more."""
        if self.samples() != 1 or not any(t.dim() for t in self.tensors()):
            return None
        return self.map_tensors(lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t)

    def dynamic_shapes(self, model: nn.Module, which: str = "all") -> dict[str, Any] | None:
        """Dimensions as torch.export's Dim.AUTO: "all", the "batch" (dim 0 of what has as many samples), or "none"."""
        auto, samples = torch.export.Dim.AUTO, self.samples()

        def dims(value: Any) -> dict[int, Any] | None:
            if not isinstance(value, Tensor):
                return None
            if which == "batch":
                return {0: auto} if value.dim() and value.shape[0] == samples else {}
            return dict.fromkeys(range(value.dim()), auto)

        return None if which == "none" else pytree.tree_map(dims, dict(self._bound(model).arguments))

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, in order, in containers as well."""
        return [v for v in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(v, Tensor)]

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with f(t) in the place of each tensor t."""
        args, kwargs = pytree.tree_map_only(Tensor, f, (self.args, self.kwargs))
        return Batch(args, kwargs, self.number)

    def __str__(self) -> str:
        return "(" + ", ".join([*map(_show, self.args), *(f"{k}={_show(v)}" for k, v in self.kwargs.items())]) + ")"


def _own(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return tensor
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format).requires_grad_(tensor.requires_grad)


_REMEDY = (
    "pass prepare_batch=, a callable that turns a batch into the model's arguments, e.g. prepare_batch=lambda b: b[0]"
)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return a is b or (isinstance(a, int | float | str) and type(a) is type(b) and a == b)


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        ends = "()" if isinstance(value, tuple) else "[]"
        return ends[0] + ", ".join(map(_show, value)) + ends[1]
    return type(value).__name__


def leaves(value: Any) -> list[Any]:
    """What a model's output holds, in order: pytree containers and plain dataclasses are looked into."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += leaves([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
        else:
            found.append(leaf)
    return found


def private(values: list[Any]) -> list[Any]:
    """Copies of tensors and of what else can be copied; the same object is the same copy."""
    copies: dict[int, Any] = {}
    return [copies.setdefault(id(value), _copied(value)) for value in values]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied is handed on
        return value


def to_batch(value: Any, prepare_batch: Prepare | None = None, number: int | None = None) -> Batch:
    """A tensor is one positional argument, a tuple or list several, a mapping keyword arguments.

    Raises:
        CalibrationError: prepare_batch fails, or is no callable.

    >>> str(to_batch({"x": torch.zeros(2, 3)}))
    '(x=float32[2, 3])'
    """
    if prepare_batch is not None:
        value = _prepared(value, prepare_batch, number)
    if isinstance(value, Batch):
        return value if value.number is not None else dataclasses.replace(value, number=number)
    if isinstance(value, Mapping):
        return Batch((), dict(value), number)
    if isinstance(value, tuple | list):
        return Batch(tuple(value), {}, number)
    return Batch((value,), {}, number)


def _prepared(value: Any, prepare_batch: Prepare, number: int | None) -> Any:
    if not callable(prepare_batch):
        raise CalibrationError(f"prepare_batch={prepare_batch!r} is no callable; write e.g. lambda b: b[0]")
    try:
        return prepare_batch(value)
    except Exception as e:
        raise CalibrationError(f"prepare_batch fails on batch {number} {_show(value)}: {type(e).__name__}: {e}") from e
