"""nn.Module -> float FX graph in which every reachable weight is one get_attr node under its own name.

Two ways lead there. Symbolic tracing keeps the user's functions and every size dynamic; torch.export sees through
Python control flow. "auto" takes the first and falls back to the second where the first fails, hides weights inside
leaf modules, or computes something else than the model does.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mono_quant_fx.errors import CaptureError, ConfigError
from mono_quant_fx.execution.batch import Batch, to_batch
from mono_quant_fx.frontend.belongings import kept
from mono_quant_fx.frontend.export import follow_inputs
from mono_quant_fx.frontend.export_ways import exported
from mono_quant_fx.frontend.failures import explain_export, explain_failure
from mono_quant_fx.frontend.faithfulness import Expectation, check_faithful, expectation
from mono_quant_fx.frontend.preconditions import check_model
from mono_quant_fx.frontend.randomness import own_generators
from mono_quant_fx.frontend.record import CaptureRecord, plain_batch, set_closed, set_record, tied_names
from mono_quant_fx.frontend.symbolic import open_modules, trace
from mono_quant_fx.frontend.tracing_lock import tracing
from mono_quant_fx.frontend.twins import global_hooks, own_hooks, without_global_hooks
from mono_quant_fx.functionalization.functionalize import input_notes
from mono_quant_fx.graph.weight_ops import find_weights, hidden_weights
from mono_quant_fx.process.surroundings import plain

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
    gm, notes = captured(model, example_inputs, method=method, dynamic_shapes=dynamic_shapes)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return gm


Captured = tuple[fx.GraphModule, list[str]]


def captured(model: Any, example_inputs: Any = None, *, method: str = "auto", dynamic_shapes: Any = None) -> Captured:
    """What capture returns, and the notes that it says as warnings."""
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: one of {', '.join(map(repr, METHODS))} is needed")
    with plain(model):
        is_program = isinstance(model, torch.export.ExportedProgram)
        model = check_model(model.module() if isinstance(model, torch.export.ExportedProgram) else model)
        example = None if example_inputs is None else to_batch(example_inputs).fresh()
        notes: list[str] = []
        if isinstance(model, fx.GraphModule):
            gm = given(model, example)
            if is_program:
                follow_inputs(gm)
        else:
            if example is not None:
                example.check_fits(model)
            gm, notes = attempt(model, example, method, dynamic_shapes)
        return gm, [*notes, *input_notes(gm)]


def given(model: fx.GraphModule, example: Batch | None) -> fx.GraphModule:
    """A GraphModule that somebody else made, its weight modules opened and, on the example, compared with its call.

    Raises:
        CaptureError: calling it does more than running its graph, or a module in it cannot be opened.
    """
    with tracing(), kept(model):
        expected = None
        with contextlib.suppress(CaptureError):  # a graph that does not run on the data says so where it is run
            expected = None if example is None else expectation(model, example)
        around = [*own_hooks(model), *global_hooks(), *(["its own forward"] if "forward" in vars(model) else [])]
        if around and expected is None:
            raise CaptureError(
                f"{type(model).__name__}: {', '.join(around)} acts around the graph, which does not hold it: remove "
                "it, capture the module that was traced, or give example_inputs, on which it is seen to change nothing"
            )
        with without_global_hooks():
            try:
                gm = open_modules(model)
            except Exception as e:
                raise CaptureError(explain_failure(model, {"opening its modules": e}, "auto", True)) from e
            if expected is not None:
                check_faithful(gm, expected, is_strict=True)
    return gm


def attempt(
    model: nn.Module, example: Batch | None, method: str, dynamic_shapes: Any = None, *, is_compared: bool = True
) -> Captured:
    """The graph that `method` leads to, and what the user should know about it.

    Args:
        is_compared: the graph must compute on the example what the model does; needs a model with values.

    Raises:
        CaptureError: no way leads to a graph.
    """
    hooks = global_hooks()
    if hooks and (example is None or not is_compared):
        raise CaptureError(
            f"{type(model).__name__}: a graph holds no global hook, and {', '.join(hooks)} is registered for every "
            "module: remove it, or give example_inputs, on which it can be seen to change nothing"
        )
    with tracing(), kept(model), own_generators():
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
        with without_global_hooks():
            return self._run(method)

    def _run(self, method: str) -> Captured:
        failures: dict[str, BaseException] = {}
        symbolic = None
        if method != "export":
            symbolic = self._try("symbolic tracing", self._symbolic, failures)
            if symbolic is not None and not _worth_exporting(symbolic[0]):
                return symbolic
            if symbolic is not None and method == "symbolic":
                return _closed(symbolic, BY_SYMBOLIC)
        if method != "symbolic" and self.example is not None:
            exported = self._try("torch.export", self._export, failures)
            if exported is not None and (symbolic is None or _reachable(exported[0]) > _reachable(symbolic[0])):
                return exported
        if symbolic is not None:
            failure = failures.get("torch.export")
            tried = BY_BOTH if self.example is not None else BY_EXAMPLE
            return _closed(symbolic, tried if failure is None else explain_export(self.model, failure))
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
        gm = trace(self.model, names, None if self.example is None else len(self.example.args))
        if self.expected is not None:
            check_faithful(gm, self.expected, is_strict=True)
        record = CaptureRecord("symbolic", None if names is None else tuple(names), tied=tied_names(self.model))
        return set_record(gm, record), []

    def _export(self) -> Captured:
        assert self.example is not None
        found = exported(self.model, self.example, self.dynamic_shapes, self.expected)
        tied, has_own_sizes = tied_names(self.model), self.dynamic_shapes is not None
        record = CaptureRecord("export", None, plain_batch(found.batch), has_own_sizes, tied, found.dynamic)
        return set_record(found.graph_module, record), found.notes


#: Why modules that hide their weights stay closed, and what opens them.
BY_SYMBOLIC = 'method="auto" with example_inputs lets torch.export open it'
BY_EXAMPLE = "give example_inputs, or data, so that torch.export can open it"
BY_BOTH = "torch.export does not open it either; give it a forward of its own that calls ops on its weights"


def _closed(found: Captured, why: str) -> Captured:
    return set_closed(found[0], why), found[1]


def _worth_exporting(gm: fx.GraphModule) -> bool:
    return any(max(p.dim() for p in m.parameters()) > 1 for _, m in hidden_weights(gm))


def _reachable(gm: fx.GraphModule) -> int:
    return sum(w.tensor.numel() for w in find_weights(gm) if any(use.layout for use in w.uses))
