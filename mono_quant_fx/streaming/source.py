"""A float checkpoint, matched with the model that it is for: where the value of each tensor of its graph comes from."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx.errors import PlanError
from mono_quant_fx.files.folder import TensorFolder, Tensors
from mono_quant_fx.files.wrapped_names import align, few
from mono_quant_fx.frontend.record import graph_names
from mono_quant_fx.graph.tensors import is_persistent, named_tensors
from mono_quant_fx.storage.saving import digest

#: How many names an error lists.
SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """What a graph reads, tensor by tensor.

    Attributes:
        tensors: the open files.
        names: name in the graph -> name in the files; tied tensors have one.
        values: name in the graph -> value, of what the files do not have and the model does (small buffers).
        unused: names in the files that the model does not have.
    """

    tensors: Tensors
    names: dict[str, str]
    values: dict[str, Tensor]
    unused: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor by its name in the graph."""
        return tuple(self.values[name].shape) if name in self.values else self.tensors.entries[self.names[name]].shape

    def nbytes(self, name: str) -> int:
        """Of a tensor by its name in the graph."""
        return self.values[name].nbytes if name in self.values else self.tensors.entries[self.names[name]].nbytes

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start <= i < stop, in memory of their own."""
        if name not in self.values:
            return self.tensors.read_rows(self.names[name], start, stop)
        value = self.values[name]
        return value[start:stop] if value.dim() else value

    def identity(self) -> list[Any]:
        """Changes when the files or the model's own values do: names, sizes and times of files, hashes of values."""
        files = self.tensors.files.values() if isinstance(self.tensors, TensorFolder) else [self.tensors]
        found: list[Any] = []
        for file in files:
            stat = file.path.stat()
            found.append([file.path.name, stat.st_size, stat.st_mtime_ns])
        for name, value in sorted(self.values.items()):
            found.append([name, bytes(digest(value).tolist()).hex()])
        return found

    def holds(self, path: Path) -> bool:
        """Whether this is one of the files, or their folder."""
        files = self.tensors.files.values() if isinstance(self.tensors, TensorFolder) else [self.tensors]
        found = [Path(os.path.abspath(file.path)) for file in files]
        target = path.resolve()
        return any(target in (file.resolve(), file.parent.resolve()) for file in found)


def match(tensors: Tensors, gm: fx.GraphModule, model: nn.Module) -> Checkpoint:
    """Finds every tensor of the float graph in the checkpoint, under any of its names, or in the model.

    Names in the checkpoint may have what torch.compile, DataParallel and FSDP put into them (see wrapped_names).

    Raises:
        PlanError: a tensor is nowhere, has another shape or dtype, or two that are tied differ; names them all (five).
    """
    aliases = _aliases(model)
    spelled = align(tensors.entries, [name for part in (model, gm) for name, _ in named_tensors(part)])
    own = {name for name, _ in named_tensors(model)}
    names, values, faults, absent = dict[str, str](), dict[str, Tensor](), list[str](), list[str]()
    for name, tensor in named_tensors(gm):
        found = [spelled[n] for n in aliases.get(name, [name]) if n in spelled]
        value = tensor if not tensor.is_meta else _own_value(model, aliases.get(name, [name]))
        if found:
            names[name] = found[0]
            faults += _differing(tensors, found, tensor)
        elif value is not None:
            values[name] = value.detach()
        else:
            absent.append(next((n for n in aliases.get(name, []) if n in own), name))
    if absent:
        raise PlanError(_missing(tensors, absent, model))
    if faults:
        faults = list(dict.fromkeys(faults))
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise PlanError(f"{tensors.path} does not fit {type(model).__name__}: {'; '.join(faults[:SHOWN])}{more}")
    known = set(spelled.values())
    return Checkpoint(tensors, names, values, tuple(n for n in tensors.entries if n not in known))


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Every name of a tensor -> all its names, itself first."""
    same = defaultdict(list)
    for name, tensor in graph_names(model):
        same[id(tensor)].append(name)
    return {name: sorted(group, key=lambda n: n != name) for group in same.values() for name in group}


def _own_value(model: nn.Module, names: list[str]) -> Tensor | None:
    """The model's own value where no checkpoint has to have it: that of a buffer outside the state_dict."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    own = next((name for name in names if name in buffers), None)
    if own is None or buffers[own].is_meta or is_persistent(model, own):
        return None
    return buffers[own]


def _differing(tensors: Tensors, found: list[str], tensor: Tensor) -> Iterator[str]:
    for name in found:
        entry = tensors.entries[name]
        if entry.shape != tuple(tensor.shape):
            yield (
                f"{name} is {list(entry.shape)} in the checkpoint and {list(tensor.shape)} in the model: build the "
                "model with the sizes of the checkpoint"
            )
        elif entry.dtype != tensor.dtype:
            yield (
                f"{name} is {_dtype(entry.dtype)} in the checkpoint and {_dtype(tensor.dtype)} in the model: build "
                f"the model in the checkpoint's dtype, model.to({entry.dtype})"
            )
        elif name != found[0] and tensors.digest(name) != tensors.digest(found[0]):
            yield f"{found[0]} and {name} are one tensor in the model and differ in the checkpoint"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _missing(tensors: Tensors, absent: list[str], model: nn.Module) -> str:
    own = {name for name, _ in named_tensors(model)}
    listed = few(absent)
    outside = [n for n in absent if n not in own or not is_persistent(model, n)]
    if outside:
        remedy = (
            f"{outside[0]} is no part of the state_dict, so that its value has to come from the model: give that "
            "buffer its value (build the model with torch.device('meta') around the parameters only, or set the buffer)"
        )
    else:
        remedy = (
            f"the names in the checkpoint are {few(tensors.entries)}; give the checkpoint of this very model; where a "
            "weight is tied to one that is there, build the model inside `with torch.device('meta')`, since "
            ".to('meta') unties it"
        )
    return f"{tensors.path} does not have {listed}, which {type(model).__name__} needs: {remedy}"
