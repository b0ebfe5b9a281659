"""Whether a captured graph computes what the model does: both run on the example, and on a second input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from mono_quant_fx.errors import CaptureError
from mono_quant_fx.execution.batch import Batch, leaves
from mono_quant_fx.frontend.agreement import Tolerance, coarsest, difference, tolerance
from mono_quant_fx.frontend.failures import explain_own_failure, reason
from mono_quant_fx.frontend.randomness import own_generators
from mono_quant_fx.frontend.rebinding import check_read, plain_tensors
from mono_quant_fx.frontend.untouched import untouched
from mono_quant_fx.frontend.variants import Variant, variants
from mono_quant_fx.graph.tensors import isolate, named_tensors
from mono_quant_fx.process.this_thread import unheard

#: What random numbers begin with: none that a model would seed itself with, so that its own seeding shows.
_SEED = 0x6D71F75E


class Expectation:
    """What a model gives on its example; and on second inputs, where it runs on them, once they are asked for.

    Raises:
        CaptureError: the model itself fails on the example.
    """

    def __init__(self, model: nn.Module, example: Batch):
        self.model, self.example = model, example
        self.variants = variants(example)
        self.rebound: set[str] = set()  # see rebinding.py
        self._seconds: dict[Variant, tuple[Batch, list[Any]] | None] = {}
        try:
            self.first = self._run(example)
        except Exception as e:
            raise CaptureError(explain_own_failure(model, example.label, e)) from e

    def second(self, variant: Variant) -> tuple[Batch, list[Any]] | None:
        """A second input and the output on it; None where the model fails, or gives NaN that the example does not."""
        if variant not in self._seconds:
            self._seconds[variant] = self._try(variant.of(self.example))
        return self._seconds[variant]

    def runs_on(self, batch: Batch) -> bool:
        """Whether the model takes a batch."""
        return self._try(batch) is not None

    @functools.cached_property
    def allowed(self) -> Tolerance:
        """How near a graph has to come, by the dtypes that the model computes in."""
        tensors = (t for _, t in named_tensors(self.model))
        return tolerance(coarsest(lambda: self._run(self.example), iter([*tensors, *self.first])))

    def _run(self, batch: Batch) -> list[Any]:
        given, twin = batch.private(), _running_twin(self.model)
        before = plain_tensors(twin)
        with untouched(self.model):
            outputs = _outputs(twin, lambda m: m(*given.args, **given.kwargs))
        after = plain_tensors(twin)
        self.rebound |= {name for name, tensor in before.items() if after.get(name) is not tensor}
        return outputs

    def _try(self, batch: Batch) -> tuple[Batch, list[Any]] | None:
        try:
            with unheard():  # what the model says of an input that the user did not give is no news
                found = self._run(batch)
        except Exception:
            return None
        return (batch, found) if _is_finite(found) or not _is_finite(self.first) else None


def expectation(model: nn.Module, example: Batch) -> Expectation | None:
    """What the model gives; None where it has tensors without values.

    Raises:
        CaptureError: the model itself fails on the example.
    """
    if any(t.is_meta for _, t in named_tensors(model)):
        return None
    return Expectation(model, example)


@dataclass(frozen=True)
class Findings:
    """Where a faithful graph still differs from the model.

    Attributes:
        held_back: the respects of ASPECTS in which its own checks refuse inputs that the model takes.
        single: what sets it apart from the model on a batch of one; "" where nothing does.
    """

    held_back: frozenset[str] = frozenset()
    single: str = ""


def check_faithful(gm: fx.GraphModule, expected: Expectation, *, is_strict: bool = False) -> Findings:
    """Compares the graph with the model on the example and on second inputs that the model takes.

    Args:
        is_strict: a batch of one may not differ either.

    Raises:
        CaptureError: the graph gives something else than the model, or fails where the model does not.
    """
    check_read(gm, expected.rebound)
    found = _compare(gm, expected, expected.example, expected.first)
    if found is not None:
        raise CaptureError(f"{found}. Most likely Python control flow was frozen")
    held, refused, single = set[str](), list[frozenset[str]](), ""
    for variant in expected.variants:
        second = None if variant.differs <= held else expected.second(variant)
        if second is None:
            continue
        try:
            found = _compare(gm, expected, *second)
        except _RefusedError:
            refused.append(variant.differs)
            continue
        if found is not None and (is_strict or variant.differs != {"single"}):
            raise CaptureError(f"{found}. Most likely Python control flow was frozen")
        held |= variant.differs
        single = found or single
    return Findings(frozenset(a for differs in refused if len(left := differs - held) == 1 for a in left), single)


class _RefusedError(Exception):
    """A check of its inputs that the graph carries refuses them."""


def _compare(gm: fx.GraphModule, expected: Expectation, batch: Batch, outputs: list[Any]) -> str | None:
    """What sets the graph apart from the model, in words; None where nothing does.

    Raises:
        _RefusedError: the graph refuses the batch.
    """
    is_example = batch is expected.example
    where = f"on {batch}" if is_example else f"on a second input {batch}"
    try:
        actual = _outputs(_running_twin(gm), functools.partial(_interpret, values=batch.private().bind(gm)))
    except Exception as e:
        if _is_refusal(e) and not is_example:
            raise _RefusedError from e
        return f"the traced graph fails {where}, where the model runs: {reason(e)}"
    found = difference(outputs, actual, tolerance(torch.float32))
    if found is not None:
        found = difference(outputs, actual, expected.allowed)
    return None if found is None else f"the traced graph computes something else than the model {where}: {found}"


def _is_refusal(error: Exception) -> bool:
    """Whether a check of its inputs that the graph carries raised the error."""
    text = str(error)
    return isinstance(error, AssertionError | RuntimeError) and (
        text.startswith(("Guard failed", "Runtime assertion failed"))
    )


def _is_finite(outputs: list[Any]) -> bool:
    tensors = [t for t in outputs if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]
    return all(bool(t.isfinite().all()) for t in tensors)


class _OrdinaryPath(TorchFunctionMode):
    """Torch's attention layers take a fused path without gradients, which gives zeros where a mask says padding.

    A trace sees the ordinary path, and so must what it is compared with. Any mode keeps them on it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _interpret(gm: nn.Module, values: list[Any]) -> Any:
    assert isinstance(gm, fx.GraphModule)
    interpreter = fx.Interpreter(gm)
    interpreter.extra_traceback = False
    return interpreter.run(*values, enable_io_processing=False)


def _running_twin(model: nn.Module) -> nn.Module:
    """A copy whose buffers may be written, where the model can be copied."""
    try:
        return isolate(model)
    except Exception:
        return model


def _outputs(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[Any]:
    """The leaves of an output, under the random numbers that every run gets."""
    with torch.no_grad(), _OrdinaryPath(), own_generators(_SEED):
        return leaves(run(model))
