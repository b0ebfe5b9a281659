"""Running a graph on a batch: values are freed after their last use, a failure names its node; a progress line."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx

from mono_quant_fx.data import Batch
from mono_quant_fx.errors import CalibrationError, MonoQuantError
from mono_quant_fx.graph import op_name


class NodeInterpreter(fx.Interpreter):
    """An interpreter whose errors say which node failed, on which shapes, for which batch."""

    def __init__(self, gm: fx.GraphModule, number: int = 0):
        super().__init__(gm, garbage_collect_values=True)
        self.extra_traceback = False
        self.number = number

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node.

        Raises:
            CalibrationError: the node failed.
        """
        try:
            return super().run_node(n)
        except MonoQuantError:
            raise
        except Exception as e:
            raise node_error(n, [self.env.get(a) for a in n.all_input_nodes], self.number, e) from e


def node_error(node: fx.Node, inputs: list[Any], number: int, cause: Exception) -> CalibrationError:
    """The error for a node that failed on batch `number`: its name, its op, the shapes it got, and the cause."""
    shapes = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in inputs)
    text = (str(cause).splitlines() or [""])[0]
    return CalibrationError(
        f"batch {number} fails at node {node.name!r} ({op_name(node)} of {shapes}): {type(cause).__name__}: {text}; "
        "does the batch have the shape and dtype of the example?"
    )


def run_batch(gm: fx.GraphModule, batch: Batch, number: int = 0) -> Any:
    """gm's output for a batch, without gradients.

    Raises:
        CalibrationError: the batch does not fit, or a node fails on it.
    """
    with torch.no_grad():
        return NodeInterpreter(gm, number).run(*batch.bind(gm), enable_io_processing=False)


class Progress:
    """A line on stderr with count and time left, for more than `quiet_below` samples on a terminal."""

    def __init__(self, label: str, total: int, quiet_below: int = 50):
        self.label, self.total, self.done = label, total, 0
        self.shown = total > quiet_below and sys.stderr.isatty()
        self.start = time.monotonic()

    def advance(self, count: int) -> None:
        """Counts `count` more samples."""
        self.done += count
        if self.shown:
            left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
            sys.stderr.write(f"\r{self.label}: {self.done}/{self.total} samples, {left:.0f} s left ")
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self.shown:
            sys.stderr.write("\n")
