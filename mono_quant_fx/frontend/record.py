"""How a graph was captured, as plain data: enough to capture a model of the same class again, without its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx.errors import FileFormatError
from mono_quant_fx.execution.batch import Batch
from mono_quant_fx.graph.own_names import plain_names, set_names
from mono_quant_fx.graph.tensors import named_tensors

KEY = "mono_quant_fx_capture"
CLOSED = "mono_quant_fx_closed"


@dataclass(frozen=True)
class CaptureRecord:
    """Of one capture.

    Attributes:
        method: "symbolic", "export", or "given" for a GraphModule that somebody else made.
        names: the inputs that symbolic tracing made placeholders; None for those without a default.
        inputs: the example that torch.export ran on, types and sizes only (see plain_batch); None where the example
            holds more than tensors, numbers, strings and containers of these.
        has_own_sizes: dynamic_shapes was given.
        tied: further name of a parameter -> the name that the graph calls it by.
        dynamic: which sizes torch.export was to leave free where dynamic_shapes was not given: "all", the "batch",
            "none".
    """

    method: str
    names: tuple[str, ...] | None = None
    inputs: Any = None
    has_own_sizes: bool = False
    tied: dict[str, str] = field(default_factory=dict)
    dynamic: str = "all"


def get_record(gm: fx.GraphModule) -> CaptureRecord:
    """The record of a captured graph, which every pass passes on."""
    record = gm.meta.get(KEY)
    return record if isinstance(record, CaptureRecord) else CaptureRecord("given")


def set_record(gm: fx.GraphModule, record: CaptureRecord) -> fx.GraphModule:
    """Puts it on a graph."""
    gm.meta[KEY] = record
    set_names(gm, record.tied)
    return gm


def set_closed(gm: fx.GraphModule, why: str) -> fx.GraphModule:
    """Notes on a graph why modules that hide their weights were not opened."""
    gm.meta[CLOSED] = why
    return gm


def closed_because(gm: fx.GraphModule) -> str:
    """That note; "" where there is none."""
    return str(gm.meta.get(CLOSED, ""))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Each further name of a tensor -> the one in the graph: its first, or a plain one where no graph can have that."""
    seen: dict[int, str] = {}
    plain = plain_names(all_names(model))
    firsts = ((n, seen.setdefault(id(t), n)) for n, t in named_tensors(model))
    return {n: plain.get(first, first) for n, first in firsts if plain.get(first, first) != n}


def all_names(model: nn.Module) -> list[str]:
    """The names of all modules, parameters and buffers."""
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    return [*modules, *(name for name, _ in named_tensors(model))]


def graph_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model under each of its names, and under the one in a graph where that differs."""
    plain = plain_names(all_names(model))
    for name, tensor in named_tensors(model):
        yield name, tensor
        if name in plain:
            yield plain[name], tensor


def plain_batch(batch: Batch) -> Any:
    """Plain data for the arguments, each tensor by dtype and shape; None where something else than plain data is in.

    >>> plain_batch(Batch((torch.zeros(2, 3),), {"n": 4}))
    {'args': [{'tensor': ['float32', [2, 3]]}], 'kwargs': {'n': {'value': 4}}}
    """
    try:
        return {"args": [_plain(v) for v in batch.args], "kwargs": {k: _plain(v) for k, v in batch.kwargs.items()}}
    except TypeError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_plain(v) for v in value]}
    if isinstance(value, dict) and all(type(k) is str for k in value):
        return {"dict": {k: _plain(v) for k, v in value.items()}}
    raise TypeError(f"{type(value).__name__} is no plain data")


def meta_batch(data: Any) -> Batch:
    """The batch that plain_batch wrote down, with tensors on the meta device.

    Raises:
        FileFormatError: `data` is something else.
    """
    try:
        return Batch(tuple(_value(v) for v in data["args"]), {str(k): _value(v) for k, v in data["kwargs"].items()})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise FileFormatError(f"the recorded example inputs are damaged ({type(e).__name__}: {e})") from e


def _value(data: Any) -> Any:
    ((kind, value),) = data.items()
    if kind == "tensor":
        name, shape = value
        dtype = getattr(torch, name) if isinstance(name, str) and name.isidentifier() else None
        if not isinstance(dtype, torch.dtype) or not all(type(size) is int for size in shape):
            raise ValueError(f"no tensor: {value!r}"[:80])
        return torch.empty(shape, dtype=dtype, device="meta")
    if kind == "value" and (value is None or type(value) in (bool, int, float, str)):
        return value
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_value(v) for v in value)
    if kind == "dict":
        return {str(k): _value(v) for k, v in value.items()}
    raise ValueError(f"no kind of value: {kind!r}"[:80])
