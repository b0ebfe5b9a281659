"""import_compressed_tensors: a quantized checkpoint of another tool as a graph that runs on our ops."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mono_quant_fx.checks import choice
from mono_quant_fx.config import QuantConfig, QuantScheme
from mono_quant_fx.errors import CheckpointError
from mono_quant_fx.execution.batch import to_batch
from mono_quant_fx.files.checkpoint_files import Checkpoint
from mono_quant_fx.frontend.capture import capture
from mono_quant_fx.frontend.record import graph_names
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.graph.tensors import attach, clone, get_attribute, is_persistent, named_tensors
from mono_quant_fx.graph.weight_ops import find_weights, matrix_shape
from mono_quant_fx.interop.foreign_weight import Reader, StoredWeight, Wanted
from mono_quant_fx.numerics.affine import QuantizedWeight
from mono_quant_fx.pass_base import Pipeline
from mono_quant_fx.passes import CodeAttachment, SkipAnnotation
from mono_quant_fx.passes.code_attachment import GivenCodes
from mono_quant_fx.pipelines import lowering
from mono_quant_fx.process.surroundings import in_plain_surroundings


@in_plain_surroundings
def import_compressed_tensors(
    folder: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Any = None,
    *,
    activations: str | None = None,
    compute: str = "auto",
    merge_linears: bool = True,
) -> fx.GraphModule:
    """Reads a folder in compressed-tensors', GPTQ's or AWQ's format into a graph that runs on our ops.

    The model is a skeleton: only its code, names, shapes and dtypes count, and its parameters may be on the meta
    device. No float weight is made of the codes, which go into the graph as they are (GPTQ's and AWQ's repacked, which
    is exact). What the folder does not hold, buffers that no state_dict has, comes from the model and needs values.

    The result is a GraphModule and no QuantizationResult, because an accuracy table compares with the float weights,
    and there are none.

    Args:
        folder: holds config.json (or GPTQ's quantize_config.json, AWQ's quant_config.json), and model.safetensors or
            shards with model.safetensors.index.json. Pickles are refused.
        model: in eval mode, in the checkpoint's dtype; it is not touched.
        example_inputs: as for quantize, on any device; needed where symbolic tracing does not succeed.
        activations: "int8_dynamic" as in QuantConfig; static INT8 inputs are the checkpoint's own.
        compute, merge_linears: as in QuantConfig.

    INT8 inputs with one static scale are kept. Inputs that the checkpoint wants rounded anew in each call stay float,
    and so does the key-value cache.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape or dtype; a variant of a format that has no
            exact counterpart here (columns permuted across groups, INT8 in groups); a damaged or unsafe file.
        CaptureError: the skeleton has no graph. ConfigError: a bad setting.
    """
    choice("activations", activations, (None, "int8_dynamic"))
    config = QuantConfig(activations=activations, compute=compute, merge_linears=merge_linears)
    tail = lowering(config, activations=True)
    checkpoint = Checkpoint(folder)
    reader = Reader.of(checkpoint)
    names = _Names.of(model)
    checkpoint.unwrap({name for name in names.kinds if name})
    gm = _skeleton(model, example_inputs, names)
    stored = {}
    for want in _wanted(gm, names):
        found = reader.read(names.stored_as(want, checkpoint))
        if found is not None:
            stored[want.name] = found
    if not stored:
        raise CheckpointError(f"{checkpoint.folder}: it holds no quantized weight of this model; its names may differ")
    plain = _plain_tensors(gm, names, checkpoint, stored)
    _check_left_over(names, checkpoint, reader.used | {file_name for _, file_name in plain})
    for name, file_name in plain:
        _replace(gm, name, checkpoint.get(file_name).to(names.device))
    _fill_buffers(gm, names, stored)
    decided = SkipAnnotation(_config(stored))(gm).graph_module
    codes = {a.weight: _codes(stored.get(a.weight), names.device, reader.method) for _, a in annotated(decided)}
    return Pipeline((CodeAttachment(codes), *tail))(decided).graph_module


@dataclass(frozen=True)
class _Names:
    """The skeleton's tensors, under all names, and the device that the graph will be on."""

    tensors: dict[str, Tensor]
    device: torch.device
    kinds: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> _Names:
        tensors = dict(graph_names(model))
        real = (t.device for t in tensors.values() if not t.is_meta)
        kinds = {name: tuple(kind.__name__ for kind in type(part).__mro__) for name, part in model.named_modules()}
        return cls(tensors, next(real, torch.device("cpu")), kinds)

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """The names of the class, and of those above it, of the module that a tensor belongs to."""
        return self.kinds.get(name.rpartition(".")[0], ())

    def aliases(self, name: str) -> list[str]:
        """Every name of the tensor, this one first: a checkpoint has a tied tensor under one of them."""
        tensor = self.tensors.get(name)
        others = [n for n, t in self.tensors.items() if t is tensor and n != name]
        return [name, *others] if tensor is not None else [name]

    def stored_as(self, want: Wanted, checkpoint: Checkpoint) -> Wanted:
        """The weight under the name that the checkpoint has codes for."""
        parts = ("_packed", "_scale")
        for name in self.aliases(want.name):
            module = name.removesuffix("weight")
            if any(name + part in checkpoint for part in parts) or f"{module}qweight" in checkpoint:
                return replace(want, name=name, kinds=self.kinds_of(name))
        return want


def _skeleton(model: nn.Module, example_inputs: Any, names: _Names) -> fx.GraphModule:
    """A float graph with tensors of its own names; on the meta device where the model has no values."""
    if not any(t.is_meta for t in names.tensors.values()):
        return clone(capture(model, example_inputs))
    memo: dict[int, Any] = {id(t): _on_meta(t) for t in names.tensors.values()}
    gm = clone(capture(copy.deepcopy(model, memo), _example_on_meta(example_inputs)))
    for part in gm.modules():
        if isinstance(part, fx.GraphModule):
            _leave_meta(part, names.device)
    return gm


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _example_on_meta(example_inputs: Any) -> Any:
    if example_inputs is None:
        return None
    batch = to_batch(example_inputs)
    return pytree.tree_map_only(Tensor, lambda t: t.to("meta"), batch.kwargs if batch.kwargs else batch.args)


def _leave_meta(gm: fx.GraphModule, device: torch.device) -> None:
    """Where tracing wrote down the device of what it saw, the device of the tensors to come."""
    meta = torch.device("meta")
    for node in gm.graph.nodes:
        node.args, node.kwargs = (
            fx.node.map_aggregate(given, lambda a: device if isinstance(a, torch.device) and a == meta else a)
            for given in (node.args, node.kwargs)
        )
    gm.recompile()


def _wanted(gm: fx.GraphModule, names: _Names) -> Iterator[Wanted]:
    """The weights that may be stored as codes, as matrices."""
    for weight in find_weights(gm):
        use = weight.uses[0]
        if use.layout is not None:
            rows, columns = matrix_shape(tuple(weight.tensor.shape), use.layout, use.groups)
            yield Wanted(weight.name, rows, columns, weight.tensor.dtype, names.kinds_of(weight.name))


def _plain_tensors(
    gm: fx.GraphModule, names: _Names, checkpoint: Checkpoint, stored: Mapping[str, StoredWeight]
) -> list[tuple[str, str]]:
    """(name in the graph, name in the checkpoint) of what is loaded as it is, checked."""
    found = []
    for name, tensor in named_tensors(gm):
        if name in stored or name not in names.tensors:
            continue
        there = next((n for n in names.aliases(name) if n in checkpoint), None)
        if there is None and not is_persistent(gm, name):
            continue
        checkpoint.check(there or name, tuple(tensor.shape), tensor.dtype)
        found.append((name, there or name))
    return found


def _check_left_over(names: _Names, checkpoint: Checkpoint, used: set[str]) -> None:
    """Raises CheckpointError for a tensor that the model has no place for."""
    for name in checkpoint:
        if name in used or name in names.tensors:
            continue
        if name.endswith(".bias") and not bool(checkpoint.get(name).any()):
            continue  # some tools write a bias of zeros for every layer
        if name.endswith("zero_point") and not bool(checkpoint.get(name).any()):
            continue  # and zero points where they mean nothing
        raise CheckpointError(
            f"{checkpoint.where(name)} has no place in the model; check that the model is the one that was quantized"
        )


def _replace(gm: fx.GraphModule, name: str, tensor: Tensor) -> None:
    is_parameter = isinstance(get_attribute(gm, name), nn.Parameter)
    persistent = is_persistent(gm, name)
    attach(gm, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor, persistent)


def _fill_buffers(gm: fx.GraphModule, names: _Names, stored: Mapping[str, StoredWeight]) -> None:
    """Takes from the model what no checkpoint holds.

    Raises:
        CheckpointError: it has no values there either.
    """
    for name, tensor in list(named_tensors(gm)):
        if not tensor.is_meta or name in stored:
            continue
        value = names.tensors.get(name)
        if value is None or value.is_meta:
            raise CheckpointError(
                f"{name!r} is on the meta device, and a checkpoint does not hold it; give the model's buffers values "
                "(build it on the CPU, and move its parameters alone to meta)"
            )
        _replace(gm, name, value.detach().clone())


def _config(stored: Mapping[str, StoredWeight]) -> QuantConfig:
    """The checkpoint's decisions in the words of a QuantConfig: these weights, by name, and no others."""
    by_scheme: dict[QuantScheme, list[str]] = {}
    for name, found in stored.items():
        by_scheme.setdefault(found.scheme, []).append(re.escape(name))
    overrides = [("re:" + "|".join(names), scheme) for scheme, names in by_scheme.items()]
    return QuantConfig(
        overrides=(*overrides, ("re:.*", "skip")), short_row="error", indivisible="error", default_skips=False
    )


def _codes(found: StoredWeight | None, device: torch.device, method: str) -> GivenCodes:
    """What becomes of a weight for which the checkpoint has codes, or has none."""
    if found is None:
        return GivenCodes(None, f"not quantized in the {method} checkpoint")
    packed, scale, zero = found.stored
    stored = QuantizedWeight(packed.to(device), scale.to(device), None if zero is None else zero.to(device))
    return GivenCodes(stored, f"from a {method} checkpoint", method, found.input)
