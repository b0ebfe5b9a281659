"""Batches: what a user hands over as example or calibration data, turned into a model's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
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
    """The positional and keyword arguments of one call of the model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

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
        """The values of gm's placeholders, in order, nested containers flattened where the graph wants it.

        Raises:
            CalibrationError: the batch does not fit.
        """
        bound = self._bound(gm)
        bound.apply_defaults()
        values = [v for n, v in bound.arguments.items() if n != "self"]
        codegen = gm.graph._codegen
        if not isinstance(codegen, _PyTreeCodeGen):
            return values
        spec = codegen.pytree_info.in_spec
        leaves = pytree.tree_leaves(values)
        if spec is not None and len(leaves) != spec.num_leaves:
            raise CalibrationError(
                f"a batch with {len(leaves)} tensors does not fit the captured graph, which takes {spec.num_leaves}: "
                f"({', '.join(codegen.pytree_info.orig_args)}); {_REMEDY}"
            )
        return leaves

    def _bound(self, model: nn.Module) -> inspect.BoundArguments:
        signature = inspect.signature(model.forward)
        try:
            return signature.bind(*self.args, **self.kwargs)
        except TypeError as e:
            raise CalibrationError(f"a batch {self} does not fit forward{signature}: {e}; {_REMEDY}") from e

    def samples(self) -> int:
        """The size of dim 0 of the first tensor (1 if there is none with dimensions)."""
        return next((t.shape[0] for t in self._tensors() if t.dim()), 1)

    def first(self, count: int) -> Batch:
        """The first `count` samples: every tensor whose dim 0 is the sample count is cut."""
        total = self.samples()
        return self._map(lambda t: t[:count] if t.dim() and t.shape[0] == total else t)

    def doubled(self) -> Batch | None:
        """A batch of one sample repeated to two, since torch.export freezes a size of one; None when it has more."""
        if any(t.dim() and t.shape[0] != 1 for t in self._tensors()) or not any(t.dim() for t in self._tensors()):
            return None
        return self._map(lambda t: torch.cat([t, t]) if t.dim() else t)

    def dynamic_shapes(self, model: nn.Module) -> dict[str, Any]:
        """Every dimension of every tensor as torch.export's Dim.AUTO."""
        auto = torch.export.Dim.AUTO
        bound = self._bound(model).arguments
        return pytree.tree_map(
            lambda v: dict.fromkeys(range(v.dim()), auto) if isinstance(v, Tensor) else None, dict(bound)
        )

    def _tensors(self) -> list[Tensor]:
        return [v for v in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(v, Tensor)]

    def _map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        args, kwargs = pytree.tree_map_only(Tensor, f, (self.args, self.kwargs))
        return Batch(args, kwargs)

    def __str__(self) -> str:
        def show(v: Any) -> str:
            return f"{str(v.dtype)[6:]}{list(v.shape)}" if isinstance(v, Tensor) else type(v).__name__

        return "(" + ", ".join([*map(show, self.args), *(f"{k}={show(v)}" for k, v in self.kwargs.items())]) + ")"


_REMEDY = (
    "pass prepare_batch=, a callable that turns a batch into the model's arguments, e.g. prepare_batch=lambda b: b[0]"
)


def to_batch(value: Any, prepare_batch: Prepare | None = None) -> Batch:
    """A tensor is one positional argument, a tuple or list several, a mapping keyword arguments.

    >>> str(to_batch({"x": torch.zeros(2, 3)}))
    '(x=float32[2, 3])'
    """
    if prepare_batch is not None:
        value = prepare_batch(value)
    if isinstance(value, Batch):
        return value
    if isinstance(value, Mapping):
        return Batch((), dict(value))
    if isinstance(value, tuple | list):
        return Batch(tuple(value))
    return Batch((value,))


def collect(data: Iterable[Any], limit: int, prepare_batch: Prepare | None = None) -> tuple[list[Batch], int]:
    """The first `limit` samples of `data` as batches (the last one cut), and their number.

    Raises:
        CalibrationError: `data` is a tensor or no iterable, or holds no sample.
    """
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration_data is a {type(data).__name__}: an iterable of batches is needed; write [batch] for one"
        )
    batches: list[Batch] = []
    taken = 0
    for value in data:
        batch = to_batch(value, prepare_batch).first(limit - taken)
        if batch.samples():
            batches.append(batch)
            taken += batch.samples()
        if taken >= limit:
            break
    if not taken:
        raise CalibrationError("calibration_data is empty: give at least one batch, or leave it out (weights only)")
    return batches, taken
