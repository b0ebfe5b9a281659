"""Reads a saved model back: the file's plan on the graph of a float skeleton, or the graph that the file holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx.accuracy.info import QuantizationInfo
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.errors import FileFormatError, PlanError
from mono_quant_fx.files.folder import Tensors, open_tensors
from mono_quant_fx.files.json_records import from_plain
from mono_quant_fx.frontend.capture import capture
from mono_quant_fx.frontend.recapture import capture_again
from mono_quant_fx.frontend.record import CaptureRecord, set_record
from mono_quant_fx.graph.annotation import QuantAnnotation
from mono_quant_fx.graph.merging import merged_pieces
from mono_quant_fx.graph.tensors import attach, is_persistent, named_tensors
from mono_quant_fx.pass_base import Pipeline
from mono_quant_fx.passes import PlanRestoration
from mono_quant_fx.pipelines import lowering
from mono_quant_fx.process.surroundings import in_plain_surroundings
from mono_quant_fx.storage.graph_json.document import graph_from_json
from mono_quant_fx.storage.result import QuantizationResult
from mono_quant_fx.storage.saving import DIGESTS, FORMAT_VERSION, KEY
from mono_quant_fx.storage.statements import graph_faults, table_faults

#: How many differing tensors an error lists.
SHOWN = 5
#: Settings in files, before and now.
RENAMED = {"small_layer": "short_row", "activation_order": "desc_act"}


@dataclass(frozen=True)
class Header:
    """What a file says about itself, its tensors aside (see saving.py)."""

    format_version: int
    versions: dict[str, str]
    config: QuantConfig
    capture: CaptureRecord
    plan: tuple[QuantAnnotation, ...]
    table: AccuracyTable
    info: QuantizationInfo
    tied: dict[str, str]
    stacked: dict[str, list[str]]
    graph: Any = None


def read_header(file: Tensors) -> Header:
    """Raises FileFormatError unless the file is one that save wrote."""
    if KEY not in file.metadata:
        raise FileFormatError(
            f"{file.path}: no {KEY!r} entry in its header, so it is no model that mono_quant_fx.save wrote"
        )
    try:
        data = json.loads(file.metadata[KEY])
    except (ValueError, RecursionError) as e:
        raise FileFormatError(f"{file.path}: its {KEY!r} entry is no JSON ({type(e).__name__}: {e})") from e
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise FileFormatError(
            f"{file.path}: format_version {version!r:.40}; this release reads {FORMAT_VERSION}; use one that is newer"
        )
    try:
        return from_plain(Header, _as_now(data), str(file.path))
    except RecursionError as e:
        raise FileFormatError(f"{file.path}: its {KEY!r} entry is nested too deep") from e


def _as_now(data: dict[str, Any]) -> dict[str, Any]:
    """A header whose settings have the names of today."""
    config = data.get("config")
    if not isinstance(config, dict):
        return data
    config = {RENAMED.get(name, name): value for name, value in config.items()}
    if config.get("compute") == "int8":
        config |= {"compute": "auto", "activations": "int8_dynamic"}
    return data | {"config": config}


@in_plain_surroundings
def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> QuantizationResult:
    """Loads what save wrote. Weights are memory-mapped, and no float weight is ever made.

    Args:
        path: of the file, or of the folder that quantize_checkpoint wrote.
        model: the float model, which gives structure only: its values are not read, so that it may be on the meta
            device (``with torch.device("meta"): model = Net()``). It is captured as it was before, and the file's plan
            is carried out. A GraphModule that capture returned will do as well. None takes the graph from the file,
            where save(..., graph=True) put it.

    Raises:
        FileFormatError: the file is damaged, something else, or incomplete, or says one thing twice and not the same.
        CaptureError: the model cannot be captured as before.
        PlanError: the model's weights or tensors are not the file's; names them, with what was found and expected.

    >>> import tempfile
    >>> from mono_quant_fx import quantize, save
    >>> net, x = nn.Sequential(nn.Linear(256, 64), nn.ReLU()).eval(), torch.randn(2, 256)
    >>> result = quantize(net, group_size=64)
    >>> with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
    ...     save(result, f"{folder}/net.safetensors")
    ...     again = load(f"{folder}/net.safetensors", nn.Sequential(nn.Linear(256, 64), nn.ReLU()).eval())
    >>> torch.equal(again.graph_module(x), result.graph_module(x))
    True
    """
    file = open_tensors(path)
    header = read_header(file)
    _refuse(file, table_faults(header.plan, header.table, header.capture.tied))
    if model is None:
        gm = own_graph(file, header)
        _refuse(file, graph_faults(header.plan, gm))
    else:
        _check_type(model)
        float_graph = capture(model) if isinstance(model, fx.GraphModule) else capture_again(model, header.capture)
        gm = _pipeline(file, header)(float_graph).graph_module
        _fill(gm, file, header)
    return QuantizationResult(gm, header.table, header.info, header.config)


def _refuse(file: Tensors, faults: Iterator[tuple[str, str]]) -> None:
    """Raises FileFormatError for the first of what a file says twice, and not the same."""
    for weight, what in faults:
        raise FileFormatError(
            f"{file.path}: weight {weight!r} {what}; the file was changed after it was saved, and which one is right "
            "cannot be told: save it again"
        )


def _check_type(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise PlanError(f"model: the float torch.nn.Module is needed, not {type(model).__name__}")


def _pipeline(file: Tensors, header: Header) -> Pipeline:
    """The passes after the decisions, on tensors without values."""
    sizes = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in file.entries.values()}
    activations = any(entry.activations for entry in header.plan)
    return Pipeline((PlanRestoration(header.plan, sizes), *lowering(header.config, activations=activations)))


def _fill(gm: fx.GraphModule, file: Tensors, header: Header) -> None:
    """Puts the file's tensors in, after every name, shape and dtype has been compared."""
    pieces = merged_pieces(gm)
    wanted: dict[str, Tensor] = {}
    for name, tensor in named_tensors(gm):
        for own, start, stop in pieces.get(name, ()):
            wanted[own] = tensor[start:stop]
        if name not in pieces:
            wanted[header.tied.get(name, name)] = tensor
    _compare(file, wanted)
    made: dict[str, Tensor] = {}
    for name, tensor in list(named_tensors(gm)):
        source = header.tied.get(name, name)
        if source not in made:
            value = stacked(file, [own for own, *_ in pieces[name]]) if name in pieces else file.tensor(source)
            made[source] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        attach(gm, name, made[source], is_persistent(gm, name))


def stacked(file: Tensors, names: list[str]) -> Tensor:
    """Parts that lie side by side as one view; elsewhere a copy."""
    whole = file.span(names)
    if whole is not None:
        return whole
    try:
        return torch.cat([file.tensor(name) for name in names])
    except RuntimeError as e:
        raise FileFormatError(f"{file.path}: tensors {', '.join(names)} cannot be stacked: {e}") from e


def _compare(file: Tensors, wanted: Mapping[str, Tensor]) -> None:
    found = {name: entry for name, entry in file.entries.items() if name != DIGESTS}
    differing = [f"{name} is in the model and not in the file" for name in wanted if name not in found]
    differing += [f"{name} is in the file and not in the model" for name in found if name not in wanted]
    for name in found.keys() & wanted.keys():
        entry, tensor = found[name], wanted[name]
        if (entry.shape, entry.dtype) != (tuple(tensor.shape), tensor.dtype):
            differing.append(
                f"{name} is {_look(entry.shape, entry.dtype)} in the file and {_look(tensor.shape, tensor.dtype)} in "
                "the model"
            )
    if differing:
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise PlanError(
            f"{file.path} does not fit the model: {'; '.join(sorted(differing)[:SHOWN])}{more}; build the model as it "
            "was when it was saved (the same class, sizes and dtype)"
        )


def _look(shape: Any, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def own_graph(file: Tensors, header: Header) -> fx.GraphModule:
    """The graph that a file holds, with its tensors.

    Raises:
        PlanError: it holds none. GraphFormatError, FileFormatError: what it holds breaks a rule.
    """
    if header.graph is None:
        raise PlanError(f"{file.path} holds no graph: pass the float model, load(path, model), or save with graph=True")
    parts = {part for names in header.stacked.values() for part in names}
    missing = [name for name in (*parts, *header.tied.values()) if name not in file.entries]
    if missing:
        raise FileFormatError(f"{file.path}: tensor {missing[0]!r} is missing")
    tensors = {name: file.tensor(name) for name in file.entries.keys() - parts - {DIGESTS}}
    tensors |= {name: stacked(file, names) for name, names in header.stacked.items()}
    tensors |= {name: tensors[source] for name, source in header.tied.items() if source in tensors}
    return set_record(graph_from_json(header.graph, tensors), header.capture)
