"""Running a graph on a batch: values are freed after their last use, a failure names its node; a progress line."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx

from mono_quant_fx.errors import CalibrationError, MonoQuantError
from mono_quant_fx.execution.batch import Batch, private
from mono_quant_fx.graph.effects import written_inputs
from mono_quant_fx.graph.tensors import get_attribute, op_name


def run_batch(gm: fx.GraphModule, batch: Batch, replaced: Mapping[str, Any] | None = None) -> Any:
    """gm's output for a batch, without gradients; what readers see of the nodes named in `replaced` is the value there.

    Raises:
        CalibrationError: the batch does not fit, or a node fails on it; names both.
    """
    inputs, values = iter(inputs_of(gm, batch)), dict[fx.Node, Any]()
    left = Counter(a for n in gm.graph.nodes for a in n.all_input_nodes)
    with torch.no_grad():
        for node in gm.graph.nodes:
            values[node] = execute(gm, node, values.__getitem__, inputs, batch)
            if replaced and node.name in replaced:
                values[node] = replaced[node.name]
            if node.op == "output":
                return values[node]
            for source in node.all_input_nodes:
                left[source] -= 1
            for done in [n for n in (node, *node.all_input_nodes) if left[n] <= 0]:
                values.pop(done, None)
    return None


def inputs_of(gm: fx.GraphModule, batch: Batch) -> list[Any]:
    """The values of gm's placeholders; copies for this run, where a node may write into them.

    Raises:
        CalibrationError: the batch does not fit.
    """
    values = batch.bind(gm)
    return private(values) if written_inputs(gm) else values


def execute(
    gm: fx.GraphModule, node: fx.Node, value_of: Callable[[fx.Node], Any], inputs: Iterator[Any], batch: Batch
) -> Any:
    """The value of one node, its arguments looked up by `value_of` and placeholders taken from `inputs`.

    Raises:
        CalibrationError: the node fails; names it, its arguments' shapes, and the batch.
    """
    if node.op == "placeholder":
        return next(inputs)
    if node.op == "get_attr":
        return get_attribute(gm, str(node.target))
    args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of)
    try:
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            return get_attribute(gm, str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
    except CalibrationError as e:  # an observer's, which knows neither node nor batch
        source = node.all_input_nodes[0].name if node.all_input_nodes else node.name
        raise CalibrationError(f"batch {batch.place}: the output of node {source!r}: {e}; {way_out(batch)}") from e
    except MonoQuantError:
        raise
    except Exception as e:
        raise node_error(node, [value_of(a) for a in node.all_input_nodes], batch, e) from e


def node_error(node: fx.Node, inputs: list[Any], batch: Batch, cause: Exception) -> CalibrationError:
    """The error for a node that failed on a batch: its name, its op, the shapes it got, and the cause."""
    shapes = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in inputs)
    text = (str(cause).splitlines() or [""])[0]
    return CalibrationError(
        f"batch {batch.place} fails at node {node.name!r} ({op_name(node)} of {shapes}): {type(cause).__name__}: "
        f"{text}; does the batch have the shape and dtype of the example?"
    )


def check_finite(value: Tensor, what: str, batch: Batch) -> None:
    """Raises CalibrationError if a value that `batch` led to holds NaN or infinity."""
    if not bool(torch.isfinite(value).all()):
        raise CalibrationError(
            f"batch {batch.place}: {what} holds NaN or infinity ({value.numel():,} values: {_span(value)}); "
            f"{way_out(batch)}"
        )


def way_out(batch: Batch) -> str:
    """What to do about a batch that leads to NaN or infinity, and what came in."""
    came_in = [f"{list(t.shape)}, {_span(t)}" for t in batch.tensors() if t.is_floating_point()]
    inputs = f" (its inputs: {'; '.join(came_in)})" if came_in else ""
    return (
        f"look at this batch{inputs} and at the ops before this node; mask such values in prepare_batch, or drop the "
        "batch"
    )


def _span(value: Tensor) -> str:
    """The range of the finite values, and how many are not."""
    finite = value.detach()[torch.isfinite(value)].float()
    bad = value.numel() - finite.numel()
    span = f"finite ones in {finite.min():.4g} .. {finite.max():.4g}" if finite.numel() else "none finite"
    return f"{bad:,} NaN or infinite, {span}" if bad else span


class Progress:
    """A line on stderr with count, time left and a note, when it is wanted and stderr is a terminal."""

    def __init__(self, label: str, total: int, unit: str = "samples", is_shown: bool = True):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.is_shown = is_shown and sys.stderr.isatty()
        self.start = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        """Counts `count` more."""
        self.done += count
        if self.is_shown:
            left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
            line = f"{self.label}: {self.done}/{self.total} {self.unit}, {left:.0f} s left {note}"
            sys.stderr.write(f"\r{line[:110]:<110}")
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self.is_shown:
            sys.stderr.write("\n")
