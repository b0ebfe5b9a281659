"""A quantized model as one safetensors file: tensors under their own names, and how they came about as JSON.

The header's `mono_quant_fx` entry is one JSON object:

    format_version   1
    versions         of mono_quant_fx, torch and Python
    config           the QuantConfig
    capture          how the float graph was captured (CaptureRecord)
    plan             the annotation of each weight: scheme, reason, shape, what was measured
    table, info      the accuracy table and the figures
    tied             name -> the name under which the same tensor is stored
    stacked          tensor of the graph -> the names of its parts, which are stored instead of it
    graph            the graph itself, when it was asked for

Tensors that one op reads as stacked rows (merged linears) are stored apart, under their own names, but side by side, so
that reading them again is one view. Larger types come first, so that each tensor is aligned.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.files.json_records import to_plain
from mono_quant_fx.files.reader import TensorWriter
from mono_quant_fx.frontend.record import get_record
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.graph.merging import merged_pieces
from mono_quant_fx.graph.tensors import named_tensors
from mono_quant_fx.version import __version__

FORMAT_VERSION = 1
#: The entry of the header, and the tensor of SHA-256 digests, one row for each tensor before it.
KEY, DIGESTS = "mono_quant_fx", "mono_quant_fx.sha256"
_CHUNK = 1 << 22


class Stored(NamedTuple):
    """What a graph stores: tensors by the names in the file, in the file's order; tied and stacked names."""

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    stacked: dict[str, list[str]]


def stored_tensors(gm: fx.GraphModule) -> Stored:
    """Every tensor of a graph once; merged ones as the parts that they were."""
    pieces = merged_pieces(gm)
    seen: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in named_tensors(gm):
        first = seen.setdefault(_identity(tensor), name)
        if first != name:
            tied[name] = first
        elif name in pieces:
            tensors |= {own: tensor.detach()[start:stop] for own, start, stop in pieces[name]}
        else:
            tensors[name] = tensor.detach().resolve_conj().resolve_neg()
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # stable: parts stay side by side
    parts = {name: [own for own, *_ in found] for name, found in pieces.items()}
    return Stored({name: tensors[name] for name in order}, tied, parts)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    place = (id(tensor),) if tensor.numel() == 0 else (tensor.untyped_storage()._cdata, tensor.storage_offset())
    return (*place, tensor.dtype, tuple(tensor.shape), tensor.stride())


def write_model(
    path: str | os.PathLike[str],
    gm: fx.GraphModule,
    table: AccuracyTable,
    info: Any,
    config: QuantConfig,
    structure: dict[str, Any] | None,
) -> None:
    """Writes the file, or leaves what was there.

    Args:
        structure: the graph as JSON data, if it is to be in the file.
    """
    stored = stored_tensors(gm)
    tensors = stored.tensors
    metadata = header_of(gm, stored, table, info, config, structure)
    digests = torch.zeros(len(tensors), 32, dtype=torch.uint8, device="cpu")
    entries = [(name, t.dtype, tuple(t.shape)) for name, t in (*tensors.items(), (DIGESTS, digests))]
    with TensorWriter(path, entries, metadata) as writer:
        for i, (name, tensor) in enumerate(tensors.items()):
            digests[i] = digest(tensor)
            writer.write(name, tensor)
        writer.write(DIGESTS, digests)


def header_of(
    gm: fx.GraphModule,
    stored: Stored,
    table: AccuracyTable,
    info: Any,
    config: QuantConfig,
    structure: dict[str, Any] | None = None,
) -> dict[str, str]:
    """The metadata of a file that holds `stored`."""
    about = {
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "config": to_plain(config),
        "capture": to_plain(get_record(gm)),
        "plan": [to_plain(annotation, brief=True) for _, annotation in annotated(gm)],
        "table": to_plain(table),
        "info": to_plain(info),
        "tied": stored.tied,
        "stacked": stored.stacked,
    }
    if structure is not None:
        about["graph"] = structure
    return {"format": "pt", KEY: json.dumps(about, separators=(",", ":"), allow_nan=False)}


def versions() -> dict[str, str]:
    """Of what makes a file."""
    return {"mono_quant_fx": __version__, "torch": torch.__version__, "python": platform.python_version()}


def digest(tensor: Tensor) -> Tensor:
    """SHA-256 of a tensor's bytes in row order: uint8 [32]."""
    found, flat = hashlib.sha256(), tensor.detach().cpu().contiguous().view(-1)
    buffer = bytearray(_CHUNK)
    for piece in flat.view(torch.uint8).split(_CHUNK) if flat.numel() else ():
        torch.frombuffer(buffer, dtype=torch.uint8, count=len(piece)).copy_(piece)
        found.update(memoryview(buffer)[: len(piece)])
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)
