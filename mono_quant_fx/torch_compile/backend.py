"""compile_backend: torch.compile with quantized weights, for models that no capture takes whole.

Dynamo hands over one graph after another. In each the weights become constants (dynamo_graph.lift), the passes of the
default pipeline decide, replace and fuse, and the codes become inputs (dynamo_graph.rebind) of what an inner backend
compiles. A call still receives the model's own float weights; the codes that belong to them go in instead.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx.config import QuantConfig
from mono_quant_fx.errors import ConfigError, PerformanceWarning
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import QuantAnnotation, annotated, pending
from mono_quant_fx.numerics.affine import QuantizedWeight
from mono_quant_fx.pass_base import Pipeline
from mono_quant_fx.passes import CodeAttachment, SkipAnnotation
from mono_quant_fx.passes.code_attachment import GivenCodes
from mono_quant_fx.pipelines import lowering, needs_data
from mono_quant_fx.torch_compile.frames import Fallback, ensure_listening, listen
from mono_quant_fx.torch_compile.lifting import lift, rebind
from mono_quant_fx.torch_compile.report import CompileReport, Ledger
from mono_quant_fx.torch_compile.shared_codes import Entry, SharedCodes

#: The reason of a weight that may be trained: codes have no gradient.
TRAINED = "it requires gradients; torch.no_grad() or requires_grad_(False) lets it be quantized"


def compile_backend(
    config: QuantConfig | None = None,
    *,
    inner: str | Callable[..., Any] = "inductor",
    model: nn.Module | None = None,
    **config_fields: Any,
) -> CompileBackend:
    """A backend for torch.compile that quantizes the weights of every graph that Dynamo captures.

    Weights are rounded to nearest, without data. The model is not touched, and keeps its float weights.

    Args:
        config: a QuantConfig; `config_fields` are its fields as keywords and win over it.
        inner: the backend that compiles the quantized graphs: a name that torch.compile knows, or a callable.
        model: whose names the weights get, in patterns and in the report. Without it a weight of a frame that begins
            in a submodule (after a graph break in there) is called as that submodule calls it.

    Raises:
        ConfigError: a bad setting, one that needs calibration data, or an unknown inner backend.

    While it compiles: WeightError for NaN or infinity in a weight, and AccuracyError, which torch.compile wraps in
    torch._dynamo.exc.BackendCompilerFailed.

    >>> net = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    >>> backend = compile_backend(group_size=64, inner="eager")
    >>> with torch.no_grad():
    ...     y = torch.compile(net, backend=backend)(torch.randn(2, 256))
    >>> backend.report.quantized
    {'0.weight': 'int4 g64 sym', '2.weight': 'int4 g64 sym'}
    """
    config = QuantConfig.build(config, config_fields)
    missing = needs_data(config)
    if missing is not None:
        raise ConfigError(f"compile_backend sees weights and no data, but {missing}; quantize() takes data")
    return CompileBackend(config, _look_up(inner), model)


def _look_up(inner: str | Callable[..., Any]) -> Callable[..., Any]:
    if callable(inner):
        return inner
    import torch._dynamo  # costs a second, and only this needs it

    try:
        return torch._dynamo.lookup_backend(inner)
    except torch._dynamo.exc.InvalidBackend as e:
        known = ", ".join(torch._dynamo.list_backends(exclude_tags=()))
        raise ConfigError(f"inner={inner!r}: a backend that torch.compile knows is needed: {known}") from e


class CompileBackend:
    """What compile_backend returns: a Dynamo backend. One may serve any number of models and of compilations.

    Codes are kept by weight, as long as the weight lives: a recompilation, or another graph with the same weight, uses
    the same ones. A weight that was written into, or replaced, is rounded again at the next call.
    """

    def __init__(self, config: QuantConfig, inner: Callable[..., Any], model: nn.Module | None = None):
        self.config, self.inner = config, inner
        self._codes = SharedCodes()
        self._ledger = Ledger(config, model)
        self._listener = listen(self, CompileBackend._left_to_python)

    @property
    def report(self) -> CompileReport:
        """What was quantized so far, and what was not, and why; figures as of the compilation."""
        return self._ledger.report()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """Called by Dynamo: one graph, and the values (weights among them) of its first call."""
        ensure_listening(self._listener)
        lifted = lift(gm, example_inputs, self._ledger.model)
        decided = SkipAnnotation(self.config, whole=False)(lifted.graph_module).graph_module
        entries, floats = self._encode(decided)
        codes = {name: GivenCodes(entry.stored) for name, entry in entries.items()}
        codes |= {name: GivenCodes(None, reason) for name, reason in floats.items()}
        attached = CodeAttachment(codes)(decided).graph_module
        number = self._ledger.add(attached, entries)
        if not entries and TRAINED in floats.values():
            warnings.warn(f"compile_backend: a graph runs in float: {TRAINED}", PerformanceWarning, stacklevel=2)
        if not entries:
            return self.inner(gm, list(example_inputs), **options)
        tail = lowering(replace(self.config, merge_linears=False), activations=False)
        quantized = Pipeline(tail)(attached).graph_module
        slots = [
            _Slot(self, number, lifted.inputs[a.weight], a)
            for _, a in annotated(quantized)
            if a.lowered and a.weight in lifted.inputs
        ]
        places = {n: (i, j) for i, slot in enumerate(slots) for j, n in enumerate(slot.annotation.storage_names)}
        bound = rebind(quantized, lifted, gm, tuple(places))
        compiled = _Compiled(slots, bound.kept, tuple(places[name] for name in bound.constants))
        inputs = compiled.inputs(example_inputs)
        fixed = _fixed(inputs[len(bound.kept) :])
        compiled.inner = self.inner(bound.graph_module, inputs, **options)
        del fixed  # the compilation finds them for as long as they live
        return compiled

    def _left_to_python(self, fallback: Fallback) -> None:
        if self._ledger.leave(fallback):
            text = f"compile_backend: {fallback}. What it computes itself stays float; so far {self.report.headline()}"
            warnings.warn(text, PerformanceWarning, stacklevel=2)

    def _encode(self, gm: fx.GraphModule) -> tuple[dict[str, Entry], dict[str, str]]:
        """The codes of what has a scheme, and the reasons of weights that must stay float all the same."""
        entries, floats = {}, {}
        for node, annotation in list(pending(gm)):
            tensor = tensors.get_tensor(gm, node)
            assert tensor is not None
            reason = _why_float(tensor)
            if reason is not None:
                floats[annotation.weight] = reason
            else:
                entries[annotation.weight] = self._codes.of(tensor, annotation)
        return entries, floats

    def encode(self, tensor: Tensor, annotation: QuantAnnotation, number: int) -> Entry:
        """The codes of a weight that graph `number` was called with; for the report too, if it is a new one."""
        entry = self._codes.of(tensor, annotation)
        self._ledger.sight(number, tensor, annotation, entry)
        return entry


def _why_float(tensor: Tensor) -> str | None:
    if tensor.requires_grad and torch.is_grad_enabled():
        return TRAINED
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"it is a {type(tensor).__name__}, no plain tensor"
    return "it is on the meta device, without values" if tensor.is_meta else None


def _fixed(codes: Sequence[Tensor]) -> list[Tensor]:
    """What the compilation in progress is to take for the codes: their sizes never change, as those of inputs may."""
    mode = torch._guards.detect_fake_mode()
    return [] if mode is None else [mode.from_tensor(tensor, static_shapes=True) for tensor in codes]


@dataclass
class _Slot:
    """A weight among a graph's inputs. Dynamo may call one graph with the weights of several like modules in turn."""

    backend: CompileBackend
    number: int
    position: int
    annotation: QuantAnnotation
    #: By id of the weight; weak, so that codes die with the weight, and not with the compiled graph.
    entries: dict[int, weakref.ref[Entry]] = field(default_factory=dict)

    def read(self, weight: Tensor) -> QuantizedWeight:
        """The codes of the weight as it is now."""
        kept = self.entries.get(id(weight))
        entry = None if kept is None else kept()
        if entry is None or not entry.is_of(weight):
            entry = self.backend.encode(weight, self.annotation, self.number)
            self.entries[id(weight)] = weakref.ref(entry)
        return entry.stored


class _Compiled:
    """What Dynamo calls: takes the inputs of its graph, and gives codes to the inner one in place of weights."""

    inner: Callable[..., Any]

    def __init__(self, slots: list[_Slot], kept: tuple[int, ...], places: tuple[tuple[int, int], ...]):
        self.slots, self.kept, self.places = slots, kept, places

    def inputs(self, values: Sequence[Any]) -> list[Any]:
        stored = [slot.read(values[slot.position]) for slot in self.slots]
        return [*(values[i] for i in self.kept), *(stored[i][j] for i, j in self.places)]

    def __call__(self, *values: Any) -> Any:
        return self.inner(*self.inputs(values))
