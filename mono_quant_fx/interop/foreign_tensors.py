"""The tensors of a quantized checkpoint, read with what it says about them at hand, and what is made of one weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mono_quant_fx.config import QuantScheme
from mono_quant_fx.errors import CheckpointError, ConfigError
from mono_quant_fx.files.checkpoint_files import Checkpoint
from mono_quant_fx.numerics.affine import QuantizedWeight, num_groups


@dataclass(frozen=True)
class Wanted:
    """A weight of the model, viewed as the matrix [rows, columns], with its dtype.

    `kinds` are the names of its module's class and the classes above it, as far as they are known.
    """

    name: str
    rows: int
    columns: int
    dtype: torch.dtype
    kinds: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """What stands before "weight" in its name, the dot included."""
        return self.name.removesuffix("weight")


@dataclass(frozen=True)
class StoredWeight:
    """Its scheme and codes, and the static scale and zero point of its module's INT8 input, if it has one."""

    scheme: QuantScheme
    stored: QuantizedWeight
    input: tuple[float, int] | None = None


class Grouping(NamedTuple):
    """The size of a group of columns, -1 for all, and how many groups there are."""

    size: int
    groups: int


@dataclass
class Tensors:
    """A checkpoint's tensors.

    Attributes:
        config: what describes the quantization, whichever file it stands in.
        where: that file, for errors.
        used: every tensor that has been read.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    where: str
    used: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        """() for one that is missing."""
        return self.checkpoint.kind(name)[1] if name in self.checkpoint else ()

    def check(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        """See Checkpoint.check."""
        self.checkpoint.check(name, shape, *dtypes)

    def get(self, name: str) -> Tensor:
        """The tensor."""
        self.used.add(name)
        return self.checkpoint.get(name)

    def scale(self, name: str) -> Tensor:
        """A tensor of scales.

        Raises:
            CheckpointError: one is NaN or infinite; what it multiplies would be as well.
        """
        scale = self.get(name)
        count = int((~torch.isfinite(scale.float())).sum())
        if count:
            raise self.error(
                name,
                f"{count} of {scale.numel()} scales are NaN or infinite, so that the weight would be; quantize it "
                "again, or download the file again",
            )
        return scale

    def error(self, name: str, why: str) -> CheckpointError:
        """An error about a tensor."""
        return CheckpointError(f"{self.checkpoint.where(name)}: {why}")

    def contradiction(self, name: str, found: str, said: str, way_out: str) -> CheckpointError:
        """An error about a tensor that is other than the config says."""
        return self.error(name, f"{found}, but {self.where} says {said}; {way_out}")


def scheme_of(bits: int, grouping: Grouping, symmetric: bool, what: str) -> QuantScheme:
    """A QuantScheme, or CheckpointError in the words of `what`."""
    try:
        return QuantScheme(bits, grouping.size, symmetric)
    except ConfigError as e:
        raise CheckpointError(f"{what}: {e}") from e


def grouping_of(size: Any, columns: int, what: str) -> Grouping:
    """The groups of a size that divides the columns.

    Raises:
        CheckpointError: it does not, or is no size; `what` says where it stands.
    """
    exact = type(size) is int and (size == -1 or (size > 0 and columns % size == 0))
    if not exact:
        raise CheckpointError(f"{what}; a group_size that divides the {columns} columns is needed")
    return Grouping(size, num_groups(columns, size))


PERMUTED = (
    "its groups are not runs of neighbouring columns (activation order without static groups), which has no exact form "
    "here; use a checkpoint made with desc_act=False or static_groups=True"
)
