"""nn.Module -> float FX graph in which every reachable weight is one get_attr node under its own name.

Two ways lead there. Symbolic tracing keeps the user's functions and every size dynamic; torch.export sees through
Python control flow. "auto" takes the first and falls back to the second where the first fails, hides weights inside
leaf modules, or computes something else than the model does.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from mono_quant_fx import graph
from mono_quant_fx.capture_errors import explain_failure
from mono_quant_fx.data import Batch, to_batch
from mono_quant_fx.errors import CaptureError, ConfigError
from mono_quant_fx.tracer import QuantTracer, required_inputs
from mono_quant_fx.weight_ops import WEIGHT_MODULES, find_weights, hidden_weights

METHODS = ("auto", "symbolic", "export")


def capture(
    model: nn.Module | fx.GraphModule | torch.export.ExportedProgram,
    example_inputs: Any = None,
    *,
    method: str = "auto",
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """Captures a model in eval mode as an FX graph that shares its tensors; the model itself is not touched.

    Args:
        model: an nn.Module, a GraphModule (its Linear, Conv and Embedding calls are opened) or an ExportedProgram.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. Needed for torch.export only.
        method: "symbolic", "export", or "auto" (symbolic where it is faithful, else export).
        dynamic_shapes: as torch.export takes it; by default every size of every input is dynamic where the model
            allows it. A size that the model fixes is said in a warning.

    Raises:
        CaptureError: the model is in training mode, or no way leads to a graph; names the user's line and a remedy.
        ConfigError: an unknown method.

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
    if isinstance(model, torch.export.ExportedProgram):
        return _normalize(model.module())
    if not isinstance(model, nn.Module):
        raise CaptureError(f"a torch.nn.Module is needed, not {type(model).__name__}; wrap a function in a Module")
    _check_eval(model)
    if isinstance(model, fx.GraphModule):
        return _open_modules(model)
    example = None if example_inputs is None else to_batch(example_inputs)
    return _Attempts(model, example, dynamic_shapes).run(method)


@dataclass
class _Attempts:
    """The ways tried so far and how each failed, for the one error that tells the whole story."""

    model: nn.Module
    example: Batch | None
    dynamic_shapes: Any

    def run(self, method: str) -> fx.GraphModule:
        failures: dict[str, BaseException] = {}
        symbolic = None
        if method != "export":
            symbolic = self._try("symbolic tracing", self._symbolic, failures)
            if symbolic is not None and (method == "symbolic" or not self._worth_exporting(symbolic)):
                return symbolic
        if method != "symbolic" and self.example is not None:
            exported = self._try("torch.export", self._export, failures)
            if exported is not None and (symbolic is None or _reachable(exported) > _reachable(symbolic)):
                return exported
        if symbolic is not None:
            return symbolic
        raise CaptureError(explain_failure(self.model, failures, method, self.example is not None)) from next(
            reversed(failures.values()), None
        )

    def _try(
        self, name: str, way: Callable[[], fx.GraphModule], failures: dict[str, BaseException]
    ) -> fx.GraphModule | None:
        try:
            return way()
        except Exception as e:
            failures[name] = e
            return None

    def _symbolic(self) -> fx.GraphModule:
        names = None if self.example is None else self.example.names(self.model)
        gm = trace(self.model, names)
        if self.example is not None:
            _check_faithful(self.model, gm, self.example)
        return gm

    def _export(self) -> fx.GraphModule:
        assert self.example is not None
        return export(self.model, self.example, self.dynamic_shapes)

    def _worth_exporting(self, gm: fx.GraphModule) -> bool:
        return any(max(p.dim() for p in m.parameters()) > 1 for _, m in hidden_weights(gm))


def trace(model: nn.Module, inputs: list[str] | None = None) -> fx.GraphModule:
    """Symbolic tracing with QuantTracer."""
    gm = fx.GraphModule(model, QuantTracer(inputs).trace(model))
    return _normalize(gm)


def export(model: nn.Module, example: Batch, dynamic_shapes: Any = None) -> fx.GraphModule:
    """torch.export with every size dynamic; an example with one sample is doubled so that the batch stays dynamic."""
    tries = [example] if dynamic_shapes is not None else [b for b in (example.doubled(), example) if b is not None]
    model = graph.isolate(model)  # some modules (LSTM) rebind their own attributes while they are exported
    for i, batch in enumerate(tries):
        shapes = dynamic_shapes if dynamic_shapes is not None else batch.dynamic_shapes(model)
        try:
            with _quiet():
                program = torch.export.export(model, batch.args, batch.kwargs, dynamic_shapes=shapes, strict=False)
                gm = _normalize(program.module())
        except Exception:
            if i + 1 < len(tries):
                continue
            raise
        break
    _say_fixed_sizes(program, dynamic_shapes is None)
    return gm


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's own notes on a failing or unusual export off the screen: CaptureError tells what matters."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export")]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for log in loggers:
            log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


def _say_fixed_sizes(program: torch.export.ExportedProgram, wanted: bool) -> None:
    inputs = set(program.graph_signature.user_inputs)
    fixed = [
        f"{n.name}.shape[{i}] = {size}"
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in inputs and isinstance(n.meta.get("val"), Tensor)
        for i, size in enumerate(n.meta["val"].shape)
        if is_concrete_int(size)
    ]
    if wanted and fixed:
        warnings.warn(f"capture: the model fixes {', '.join(fixed)}; other sizes will be refused", stacklevel=6)


def _normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """One get_attr node a tensor, in a clone without the tracer's leftovers, in eval mode."""
    gm = graph.clone(gm).train(False)
    first: dict[Any, fx.Node] = {}
    for node in list(gm.graph.nodes):
        tensor = graph.get_tensor(gm, node)
        if tensor is None:
            continue
        twin = first.setdefault(_identity(tensor), node)
        if twin is not node:
            node.replace_all_uses_with(twin)
            gm.graph.erase_node(node)
    graph.drop_unused(gm)
    gm.recompile()
    return gm


def _identity(tensor: Tensor) -> Any:
    if tensor.numel() == 0:
        return id(tensor)
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _open_modules(gm: fx.GraphModule) -> fx.GraphModule:
    """Replaces each call of a weight module by what its forward does, and returns a normalized clone."""
    gm = graph.clone(gm)
    for node in list(gm.graph.nodes):
        module = graph.get_attribute(gm, node.target) if node.op == "call_module" else None
        if not isinstance(module, WEIGHT_MODULES) or type(module) not in WEIGHT_MODULES:
            continue
        inner = QuantTracer().trace(module)
        bound = dict(zip(required_inputs(module), node.args, strict=False)) | node.kwargs
        values = {n: bound[str(n.target)] for n in inner.nodes if n.op == "placeholder"}
        last = node.prev
        with gm.graph.inserting_before(node):
            result = gm.graph.graph_copy(inner, values)  # type: ignore[arg-type]
        while node.prev is not last:
            last = last.next
            _adopt(last, node, module)
        node.replace_all_uses_with(result)  # type: ignore[arg-type]
        gm.graph.erase_node(node)
    return _normalize(gm)


def _adopt(new: fx.Node, call: fx.Node, module: nn.Module | None) -> None:
    path = str(call.target)
    if new.op == "get_attr":
        new.target = f"{path}.{new.target}"
    stack = dict(call.meta.get("nn_module_stack") or {})
    stack[path] = (path, type(module))
    new.meta = {**call.meta, "nn_module_stack": stack}


def _reachable(gm: fx.GraphModule) -> int:
    return sum(w.tensor.numel() for w in find_weights(gm) if any(use.layout for use in w.uses))


def _check_eval(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and (name == "" or any(True for _ in module.buffers()) or isinstance(module, _DROPOUTS)):
            where = f"its module {name!r}" if name else "it"
            raise CaptureError(
                f"{type(model).__name__}: {where} is in training mode; quantization works on a model in eval mode: "
                "call model.eval() first"
            )


_DROPOUTS = (nn.modules.dropout._DropoutNd,)


def _check_faithful(model: nn.Module, gm: fx.GraphModule, example: Batch) -> None:
    """Raises CaptureError if the graph computes something else than the model on the example."""
    with torch.no_grad():
        expected = pytree.tree_leaves(graph.isolate(model)(*example.args, **example.kwargs))
        actual = pytree.tree_leaves(graph.isolate(gm)(*example.bind(gm)))
    same = len(expected) == len(actual) and all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
        for a, b in zip(expected, actual, strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )
    if not same:
        raise CaptureError("the traced graph computes something else than the model: Python control flow was frozen")
