"""The tensors of a stored graph: each as its record says, under its name and the names tied to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mono_quant_fx.errors import GraphFormatError
from mono_quant_fx.storage.graph_json.values import DTYPES, fields, need, show, within


@dataclass
class TensorTable:
    """Every name -> (tensor, whether it belongs to the state_dict); tied names give the very same object."""

    entries: dict[str, tuple[Tensor, bool]]
    taken: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, records: Any, tied: Any, tensors: Mapping[str, Tensor]) -> TensorTable:
        """Checks the tensors against their records.

        Raises:
            GraphFormatError: one is missing, not recorded, or of another dtype or shape.
        """
        need(isinstance(records, dict), "tensors", records, "an object is needed")
        need(isinstance(tied, dict), "tied", tied, "an object is needed")
        unknown = [name for name in tensors if name not in records]
        if unknown:
            raise GraphFormatError(f"the tensor {show(unknown[0])} is given, and the graph has no record of it")
        entries: dict[str, tuple[Tensor, bool]] = {}
        for name, record in records.items():
            with within(f"tensor {show(name)}"):
                need(name in tensors, "it", None, "the graph reads it, and it is not among the tensors given")
                entries[name] = _tensor(record, tensors[name])
        for name, first in tied.items():
            need(
                isinstance(first, str) and first in records, f"tied name {show(name)}", first, "no tensor has that name"
            )
            need(name not in records, "a tied name", name, "it has a record of its own")
            entries[name] = entries[first]
        return cls(entries)

    def take(self, name: str) -> tuple[Tensor, bool]:
        """The tensor of that name, and whether it is persistent."""
        need(name in self.entries, "a tensor", name, "there is no record of it")
        self.taken.add(name)
        return self.entries[name]

    def below(self, prefix: str) -> list[str]:
        """The names that start with `prefix`, without it, in order."""
        return [name[len(prefix) :] for name in self.entries if name.startswith(prefix)]

    def unused(self) -> list[str]:
        """The names that nothing took."""
        return [name for name in self.entries if name not in self.taken]


def _tensor(record: Any, tensor: Any) -> tuple[Tensor, bool]:
    fields(record, "its record", "kind persistent requires_grad dtype shape")
    need(record["kind"] in ("parameter", "buffer"), "its kind", record["kind"], "it is parameter or buffer")
    for key in ("persistent", "requires_grad"):
        need(type(record[key]) is bool, f"its {key}", record[key], "it is true or false")
    dtype = record["dtype"]
    need(isinstance(dtype, str) and dtype in DTYPES, "its dtype", dtype, "torch has no such dtype")
    need(isinstance(tensor, Tensor), "it", type(tensor), "a torch.Tensor is needed")
    need(DTYPES[dtype] == tensor.dtype, "its dtype", tensor.dtype, f"the graph was stored with {dtype}")
    shape = record["shape"]
    same = isinstance(shape, list) and all(type(n) is int for n in shape) and tuple(shape) == tuple(tensor.shape)
    need(same, "its shape", tuple(tensor.shape), f"the graph was stored with {show(shape)}")
    wants_gradient = record["requires_grad"]
    can = tensor.is_floating_point() or tensor.is_complex()
    need(can or not wants_gradient, "its requires_grad", True, f"a tensor of {dtype} has no gradient")
    if record["kind"] == "parameter":
        same_kind = type(tensor) is nn.Parameter and tensor.requires_grad is wants_gradient
        return (tensor if same_kind else nn.Parameter(tensor.detach(), wants_gradient)), record["persistent"]
    same_kind = type(tensor) is Tensor and tensor.requires_grad is wants_gradient
    return (tensor if same_kind else tensor.detach().requires_grad_(wants_gradient)), record["persistent"]
