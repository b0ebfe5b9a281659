"""Captures a model without its values: all tensors may be on meta. For the first time, or as another of its class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from mono_quant_fx.errors import CaptureError, MonoQuantError
from mono_quant_fx.execution.batch import Batch, to_batch
from mono_quant_fx.frontend.belongings import kept
from mono_quant_fx.frontend.capture import attempt
from mono_quant_fx.frontend.export import export
from mono_quant_fx.frontend.preconditions import check_model
from mono_quant_fx.frontend.record import CaptureRecord, get_record, meta_batch, set_record
from mono_quant_fx.frontend.symbolic import trace
from mono_quant_fx.frontend.twins import twin, without_global_hooks
from mono_quant_fx.functionalization.functionalize import input_notes
from mono_quant_fx.graph.tensors import attach, get_attribute, is_persistent, named_tensors
from mono_quant_fx.process.surroundings import plain


def capture_without_values(model: nn.Module, example_inputs: Any = None) -> tuple[fx.GraphModule, list[str]]:
    """The float graph, with every tensor of the model on the meta device, and what the user should know about it.

    As capture(model, example_inputs) goes, but nothing is run, so that no check tells a frozen decision: where one is
    possible, an example makes no difference to symbolic tracing.

    Raises:
        CaptureError: the model is in training mode or cannot be copied, or no way leads to a graph.
        CalibrationError: the example does not fit forward.
    """
    model = check_model(model)
    example = None if example_inputs is None else to_batch(example_inputs)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    hollow = _hollow(model, CaptureRecord("symbolic"), mode)
    if example is not None:
        example.check_fits(model)
        example = _filled(example, mode)
    gm, notes = attempt(hollow, example, "auto", is_compared=False)
    record = get_record(gm)
    _to_meta(gm)
    return set_record(gm, record), [*notes, *input_notes(gm)]


def capture_again(model: nn.Module, record: CaptureRecord) -> fx.GraphModule:
    """The float graph, with every tensor of the model on the meta device.

    Forward sees tensors without values that claim to be on the CPU, since models branch on the device.

    Raises:
        CaptureError: the record does not suffice, or this model does not go that way; says what to do instead.
    """
    model = check_model(model)
    given = "capture the model yourself (mq.capture with the inputs of the first time) and pass the graph"
    unsaid = {"given": "by other means than mq.capture", "export": "from inputs that no file can hold"}
    if record.has_own_sizes:
        unsaid["export"] = "with dynamic_shapes of its own"
    elif record.inputs is not None:
        unsaid.pop("export")
    if record.method in unsaid:
        raise CaptureError(f"{type(model).__name__}: the saved model was captured {unsaid[record.method]}; {given}")
    try:
        with plain(model), kept(model), without_global_hooks():
            gm = _without_values(model, record)
    except MonoQuantError:
        raise
    except Exception as e:
        reason = str(e).partition("\n")[0]
        raise CaptureError(
            f"{type(model).__name__} cannot be captured as the saved model was (by {record.method}): "
            f"{type(e).__name__}: {reason}; {given}"
        ) from e
    return set_record(gm, record)


def _without_values(model: nn.Module, record: CaptureRecord) -> fx.GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    hollow = _hollow(model, record, mode)
    if record.method == "symbolic":
        gm = trace(hollow, None if record.names is None else list(record.names))
    else:
        gm, _ = export(hollow, _filled(meta_batch(record.inputs), mode), dynamic=record.dynamic)
    _to_meta(gm)
    return gm


def _to_meta(gm: fx.GraphModule) -> None:
    tensors, made = list(named_tensors(gm)), dict[int, Tensor]()  # the list keeps ids from being used again
    for name, tensor in tensors:
        if isinstance(tensor, FakeTensor):
            attach(gm, name, made.setdefault(id(tensor), _like(tensor, "meta")), is_persistent(gm, name))


def _filled(batch: Batch, mode: FakeTensorMode) -> Batch:
    with mode:
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: torch.zeros_like(t, device="cpu"), (batch.args, batch.kwargs)
        )
    return Batch(args, kwargs)


def _hollow(model: nn.Module, record: CaptureRecord, mode: FakeTensorMode) -> nn.Module:
    """A twin whose tensors have no values, tied as they were."""
    original, model = model, twin(model)
    if model is original:
        raise CaptureError(f"{type(model).__name__} cannot be copied, and capturing must not touch the model itself")
    names = {name for name, _ in named_tensors(model)}
    made: dict[int, Tensor] = {}
    with mode:
        for name, tensor in list(named_tensors(model)):
            persistent = is_persistent(model, name)
            first = record.tied.get(name)
            source = get_attribute(model, first) if first in names else tensor
            if id(source) not in made:
                made[id(source)] = _like(source, "cpu")
            attach(model, name, made[id(source)], persistent)
            made[id(made[id(source)])] = made[id(source)]
    return model


def _like(tensor: Tensor, device: str) -> Tensor:
    hollow = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
