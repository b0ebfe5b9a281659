"""Which file each stored tensor goes into: what is read together stays together, and no file exceeds a size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mono_quant_fx.files.folder import SINGLE
from mono_quant_fx.graph.annotation import QuantAnnotation, annotated
from mono_quant_fx.storage.saving import DIGESTS, Stored


@dataclass(frozen=True)
class Shard:
    """One file: its name, and its tensors (on the meta device) in the order of their bytes, without the digests."""

    name: str
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def entries(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """What TensorWriter is told: the tensors, and one SHA-256 for each."""
        listed = [(name, t.dtype, tuple(t.shape)) for name, t in self.tensors.items()]
        return [*listed, (DIGESTS, torch.uint8, (len(listed), 32))]


def own_annotations(gm: fx.GraphModule) -> dict[str, tuple[QuantAnnotation, tuple[str, ...]]]:
    """Weight -> its annotation, and the names that its codes, scale and zero point have when they are stored apart."""
    found = {}
    for _, annotation in annotated(gm):
        if annotation.lowered and annotation.scheme is not None:
            own = QuantAnnotation(
                annotation.weight, annotation.scheme, annotation.reason, annotation.shape, annotation.dtype,
                annotation.layout, annotation.groups, names=annotation.names,
            )  # fmt: skip
            found[annotation.weight] = (own, own.storage_names[: 2 if annotation.scheme.symmetric else 3])
    return found


def plan_shards(stored: Stored, together: Iterable[Iterable[str]], shard_bytes: int) -> list[Shard]:
    """The files, in the order of the tensors; one called model.safetensors where all fit into one.

    Args:
        together: names that must be in one file, even if that makes it larger than `shard_bytes`.
    """
    units, size = _units(list(stored.tensors), together), {name: t.nbytes for name, t in stored.tensors.items()}
    files: list[list[str]] = []
    room = 0
    for unit in units:
        needed = sum(size[name] + 32 for name in unit)
        if not files or needed > room:
            files.append([])
            room = shard_bytes
        files[-1] += unit
        room -= needed
    place = {name: i for i, name in enumerate(stored.tensors)}  # larger elements first, parts side by side
    total = len(files)
    names = [SINGLE] if total == 1 else [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    ordered = [sorted(file, key=place.__getitem__) for file in files]
    return [Shard(n, {t: stored.tensors[t] for t in file}) for n, file in zip(names, ordered, strict=True)]


def _units(names: list[str], together: Iterable[Iterable[str]]) -> list[list[str]]:
    """The names in groups, in the order of their first members."""
    leader = {name: name for name in names}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for group in together:
        first, *others = map(find, group)
        for other in others:
            leader[find(other)] = find(first)
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(find(name), []).append(name)
    return list(units.values())
