"""nn.Module -> float FX graph in which every reachable weight is one get_attr node under its own name.

Two ways lead there. Symbolic tracing keeps the user's functions and every size dynamic; torch.export sees through
Python control flow. "auto" takes the first and falls back to the second where the first fails, hides weights inside
leaf modules, or computes something else than the model does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen

from mono_quant_fx.capture_errors import explain_failure
from mono_quant_fx.capture_record import CaptureRecord, plain_batch, set_record, tied_names
from mono_quant_fx.data import Batch, to_batch
from mono_quant_fx.errors import CaptureError, ConfigError
from mono_quant_fx.export_ways import exported
from mono_quant_fx.exporter import check_exported_mode, follow_inputs
from mono_quant_fx.faithfulness import Expectation, Findings, check_faithful, expectation
from mono_quant_fx.state import own_state
from mono_quant_fx.tracer import open_modules, trace
from mono_quant_fx.weight_ops import find_weights, hidden_weights

METHODS = ("auto", "symbolic", "export")


def capture(
    model: nn.Module | fx.GraphModule | torch.export.ExportedProgram,
    example_inputs: Any = None,
    *,
    method: str = "auto",
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """Captures a model in eval mode as an FX graph that shares its tensors; the model itself is not touched.

    Buffers that forward writes in place (a static key-value cache) are copied, so that both can run side by side.

    With an example the graph is run on it once and must give what the model gives; without one nothing checks it.

    Args:
        model: an nn.Module, a GraphModule (its Linear, Conv and Embedding calls are opened) or an ExportedProgram.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. Needed for torch.export only.
        method: "symbolic", "export", or "auto" (symbolic where it is faithful, else export).
        dynamic_shapes: as torch.export takes it; by default every size of every input is dynamic where the model
            allows it. A size that the model fixes is said in a warning.

    Raises:
        CaptureError: the model is in training mode, or no way leads to a graph; names the user's line and a remedy.
        ConfigError: an unknown method.
        CalibrationError: the example does not fit forward.

    >>> print(capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU()).eval()).code.strip())
    def forward(self, input):
        input_1 = input
        _0_weight = getattr(self, "0").weight
        _0_bias = getattr(self, "0").bias
        linear = torch._C._nn.linear(input_1, _0_weight, _0_bias);  input_1 = _0_weight = _0_bias = None
        _1 = getattr(self, "1")(linear);  linear = None
        return _1
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: one of {', '.join(map(repr, METHODS))} is needed")
    is_program = isinstance(model, torch.export.ExportedProgram)
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if not isinstance(model, nn.Module):
        raise CaptureError(f"a torch.nn.Module is needed, not {type(model).__name__}; wrap a function in a Module")
    check_eval(model)
    if isinstance(model, fx.GraphModule):
        gm = open_modules(model)
        if is_program:
            follow_inputs(gm)
        own_state(gm)
        return gm
    example = None if example_inputs is None else to_batch(example_inputs).fresh()
    if example is not None:
        example.check_fits(model)
    gm, notes = attempt(model, example, method, dynamic_shapes)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    own_state(gm)
    return gm


Captured = tuple[fx.GraphModule, list[str]]


def attempt(
    model: nn.Module, example: Batch | None, method: str, dynamic_shapes: Any = None, *, is_compared: bool = True
) -> Captured:
    """The graph that `method` leads to, and what the user should know about it.

    Args:
        is_compared: the graph must compute on the example what the model does; needs a model with values.

    Raises:
        CaptureError: no way leads to a graph.
    """
    return _Attempts(model, example, dynamic_shapes, is_compared).run(method)


@dataclass
class _Attempts:
    """The ways tried so far and how each failed, for the one error that tells the whole story."""

    model: nn.Module
    example: Batch | None
    dynamic_shapes: Any
    is_compared: bool
    expected: Expectation | None = None

    def run(self, method: str) -> Captured:
        """The graph, and what the user should know about it."""
        if self.is_compared and self.example is not None:
            self.expected = expectation(self.model, self.example)
        failures: dict[str, BaseException] = {}
        symbolic = None
        if method != "export":
            symbolic = self._try("symbolic tracing", self._symbolic, failures)
            if symbolic is not None and (method == "symbolic" or not _worth_exporting(symbolic[0])):
                return symbolic
        if method != "symbolic" and self.example is not None:
            exported = self._try("torch.export", self._export, failures)
            if exported is not None and (symbolic is None or _reachable(exported[0]) > _reachable(symbolic[0])):
                return exported
        if symbolic is not None:
            return symbolic
        raise CaptureError(explain_failure(self.model, failures, method, self.example is not None)) from next(
            reversed(failures.values()), None
        )

    def _try(self, name: str, way: Callable[[], Captured], failures: dict[str, BaseException]) -> Captured | None:
        try:
            return way()
        except Exception as e:
            failures[name] = e
            return None

    def _symbolic(self) -> Captured:
        names = None if self.example is None else self.example.names(self.model)
        gm = trace(self.model, names)
        found = Findings() if self.expected is None else check_faithful(gm, self.expected)
        if found.single:
            raise CaptureError(found.single)
        record = CaptureRecord("symbolic", None if names is None else tuple(names), tied=tied_names(self.model))
        return set_record(gm, record), []

    def _export(self) -> Captured:
        assert self.example is not None
        found = exported(self.model, self.example, self.dynamic_shapes, self.expected)
        tied, has_own_sizes = tied_names(self.model), self.dynamic_shapes is not None
        record = CaptureRecord("export", None, plain_batch(found.batch), has_own_sizes, tied, found.dynamic)
        return set_record(found.graph_module, record), found.notes


def _worth_exporting(gm: fx.GraphModule) -> bool:
    return any(max(p.dim() for p in m.parameters()) > 1 for _, m in hidden_weights(gm))


def _reachable(gm: fx.GraphModule) -> int:
    return sum(w.tensor.numel() for w in find_weights(gm) if any(use.layout for use in w.uses))


def check_eval(model: nn.Module) -> None:
    """Raises CaptureError if a module that runs is in training mode; names it."""
    modules = dict(model.named_modules())
    if isinstance(model, fx.GraphModule):  # in an exported graph the mode is an argument, and the flags mean nothing
        exported = isinstance(model.graph._codegen, _PyTreeCodeGen)
        called = [str(n.target) for n in model.graph.nodes if n.op == "call_module" and n.target != "_guards_fn"]
        modules = {n: m for n, m in modules.items() if n in called or (n == "" and not exported)}
        check_exported_mode(model)
    for name, module in modules.items():
        if module.training:
            where = f"its module {name!r}" if name else "it"
            raise CaptureError(
                f"{type(model).__name__}: {where} is in training mode; quantization works on a model in eval mode: "
                "call model.eval() first"
            )
