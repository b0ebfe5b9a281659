"""One weight of a checkpoint in any of the formats, as stored codes of ours, and which tensors it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mono_quant_fx.checkpoint_files import CONFIG, Checkpoint
from mono_quant_fx.compressed_tensors_config import Found, read_config
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.errors import CheckpointError, ConfigError
from mono_quant_fx.foreign_packing import from_awq, from_gptq, from_packed, group_order
from mono_quant_fx.numerics import QuantizedWeight, num_groups

SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
METHODS = ("compressed-tensors", "gptq", "awq")


@dataclass(frozen=True)
class Wanted:
    """A weight of the model, viewed as the matrix [rows, columns], with its dtype."""

    name: str
    rows: int
    columns: int
    dtype: torch.dtype

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


@dataclass
class Reader:
    """Reads the quantized weights of a checkpoint.

    Attributes:
        checkpoint, method: the files, and one of METHODS.
        config: the quantization_config, whichever file it stands in.
        where: that file, for errors.
        used: every tensor that has been read.
    """

    checkpoint: Checkpoint
    method: str
    config: Mapping[str, Any]
    where: str
    found: Found | None = None
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Reader:
        """Finds out the format.

        Raises:
            CheckpointError: no quantization_config, or one of a format (or a variant) that cannot be read.
        """
        config = checkpoint.json(CONFIG) or {}
        found = config.get("quantization_config") or config.get("compression_config")
        name = CONFIG
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        for file, its_method in SIDE_FILES.items():
            if not isinstance(found, Mapping) and (side := checkpoint.json(file)) is not None:
                found, name, method = side, file, side.get("quant_method", its_method)
        where = str(checkpoint.folder / name)
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{where}: a quantization_config is needed; this checkpoint is not quantized")
        if method not in METHODS:
            raise CheckpointError(f"{where}: quant_method {method!r}: one of {', '.join(METHODS)} can be read")
        reader = cls(checkpoint, str(method), found, where)
        reader._check_config()
        return reader

    def read(self, want: Wanted) -> StoredWeight | None:
        """The weight, or None where the checkpoint holds it as a plain tensor.

        Raises:
            CheckpointError: a tensor is missing or not of the shape or dtype that the model asks for, or the weight
                is stored in a way that has no exact counterpart here.
        """
        if self.method != "compressed-tensors":
            return self._read_gptq_or_awq(want) if f"{want.module}qweight" in self.checkpoint else None
        if f"{want.name}_packed" in self.checkpoint:
            return self._read_packed(want)
        if want.name in self.checkpoint and self.checkpoint.kind(want.name)[0] == torch.int8:
            return self._read_int8(want)
        return None

    def _check_config(self) -> None:
        if self.method == "compressed-tensors":
            self.found = read_config(self.config, self.where)
            return
        layout = self.config.get("checkpoint_format", "gptq")
        if self.method == "gptq" and layout not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"{self.where}: checkpoint_format {layout!r}: 'gptq' or 'gptq_v2' can be read")
        if self._bits() == 8 and self.method == "gptq":
            return
        if self._bits() != 4:
            raise CheckpointError(f"{self.where}: {self.method} of {self._bits()} bits; 4 can be read (GPTQ: 4 and 8)")
        if self.method == "awq":
            version = str(self.config.get("version", "gemm")).lower()
            if version != "gemm":
                raise CheckpointError(f"{self.where}: version {version!r} of AWQ; 'gemm' can be read")

    def _bits(self) -> Any:
        return self.config.get("bits", self.config.get("w_bit", 4))

    def _read_packed(self, want: Wanted) -> StoredWeight:
        assert self.found is not None
        n, k, check = want.rows, want.columns, self._check
        words = self.checkpoint.kind(f"{want.name}_packed")[1][-1:]
        bits = [b for b in sorted(self.found.bits) if words == (-(-k * b // 32),)]
        if len(bits) != 1:
            raise self._error(
                f"{want.name}_packed", f"{words[0] if words else 0} words a row do not hold {k} codes of a group's bits"
            )
        check(f"{want.name}_packed", (n, *words), torch.int32)
        self._check_shape(want)
        scheme, groups = self._scheme(want, bits[0], f"{want.name}_zero_point" not in self.checkpoint)
        check(f"{want.name}_scale", (n, groups), want.dtype)
        if not scheme.symmetric:
            check(f"{want.name}_zero_point", (-(-n * bits[0] // 32), groups), torch.int32)
        if f"{want.name}_g_idx" in self.checkpoint:
            self._check(f"{want.name}_g_idx", (k,), torch.int32, torch.int64)
            order = group_order(self._get(f"{want.name}_g_idx"), groups)
            if order is None or not torch.equal(order, torch.arange(groups)):
                raise self._permuted(f"{want.name}_g_idx")
        zero = None if scheme.symmetric else self._get(f"{want.name}_zero_point")
        stored = from_packed(self._get(f"{want.name}_packed"), self._get(f"{want.name}_scale"), zero, k, bits[0])
        return StoredWeight(scheme, stored, self._input(want))

    def _check_shape(self, want: Wanted) -> None:
        name = f"{want.name}_shape"
        self._check(name, (2,), torch.int64, torch.int32)
        shape = self._get(name).tolist()
        if shape != [want.rows, want.columns]:
            raise self._error(name, f"it says {shape}, and the model has {[want.rows, want.columns]}")

    def _read_int8(self, want: Wanted) -> StoredWeight:
        n = want.rows
        self._check(want.name, (n, want.columns), torch.int8)
        scale_name, zero_name = f"{want.name}_scale", f"{want.name}_zero_point"
        one = scale_name in self.checkpoint and self.checkpoint.kind(scale_name)[1] == (1,)
        shape = (1,) if one else (n, 1)  # one scale for the whole weight is the same scale for each row
        self._check(scale_name, shape, want.dtype)
        zero = None
        if zero_name in self.checkpoint:
            self._check(zero_name, shape, torch.int8)
            zero = self._get(zero_name).expand(n, 1).contiguous()
            zero = zero if bool(zero.any()) else None
        scale = self._get(scale_name).expand(n, 1).contiguous()
        stored = QuantizedWeight(self._get(want.name), scale, zero)
        return StoredWeight(QuantScheme(8, -1, zero is None), stored, self._input(want))

    def _read_gptq_or_awq(self, want: Wanted) -> StoredWeight:
        n, k, bits, m = want.rows, want.columns, int(self._bits()), want.module
        per_word = 32 // bits
        if n % per_word or (k % per_word and self.method == "gptq"):
            raise self._error(f"{m}qweight", f"a weight of {[n, k]} does not fill words of {per_word} codes")
        packed = (k // per_word, n) if self.method == "gptq" else (k, n // per_word)
        self._check(f"{m}qweight", packed, torch.int32)
        scheme, groups = self._scheme(want, bits, True)
        self._check(f"{m}scales", (groups, n), want.dtype)
        self._check(f"{m}qzeros", (groups, n // per_word), torch.int32)
        weight, zeros, scales = (self._get(f"{m}{part}") for part in ("qweight", "qzeros", "scales"))
        if self.method == "awq":
            stored = from_awq(weight, zeros, scales)
        else:
            offset = 0 if self.config.get("checkpoint_format") == "gptq_v2" else 1
            stored = from_gptq(weight, zeros, scales, self._order(want, groups), bits, offset)
        symmetric = stored.weight_zero_point is None
        return StoredWeight(QuantScheme(bits, scheme.group_size, symmetric), stored)

    def _order(self, want: Wanted, groups: int) -> torch.Tensor | None:
        name = f"{want.module}g_idx"
        if name not in self.checkpoint:
            return None
        self._check(name, (want.columns,), torch.int32, torch.int64)
        order = group_order(self._get(name), groups)
        if order is None:
            raise self._permuted(name)
        return None if torch.equal(order, torch.arange(groups)) else order

    def _scheme(self, want: Wanted, bits: int, symmetric: bool) -> tuple[QuantScheme, int]:
        """The scheme and its number of groups, from the config and, where that leaves it open, the scale's shape."""
        if self.method == "compressed-tensors":
            assert self.found is not None
            scale = f"{want.name}_scale"
            groups = (self.checkpoint.kind(scale)[1] if scale in self.checkpoint else ())[-1:] or (1,)
            sizes = [s for s in sorted(self.found.group_sizes) if (num_groups(want.columns, s),) == groups]
            if groups == (1,):
                sizes = [want.columns] if want.columns in sizes else [-1]
            size = sizes[0] if len(sizes) == 1 else 0
            what = f"{scale}: {groups[0]} groups of {want.columns} columns follow from no group_size of {self.where}"
        else:
            size = self.config.get("group_size", self.config.get("q_group_size", -1))
            what = f"{self.where}: group_size {size!r} for {want.name!r}"
        exact = isinstance(size, int) and (size == -1 or (size > 0 and want.columns % size == 0))
        if not exact:
            raise CheckpointError(f"{what}; a group_size that divides the {want.columns} columns is needed")
        try:
            return QuantScheme(bits, size, symmetric), num_groups(want.columns, size)
        except ConfigError as e:
            raise CheckpointError(f"{what}: {e}") from e

    def _input(self, want: Wanted) -> tuple[float, int] | None:
        """Scale and zero point of a static INT8 input."""
        assert self.found is not None
        scale_name, zero_name = f"{want.module}input_scale", f"{want.module}input_zero_point"
        if not self.found.static_inputs or scale_name not in self.checkpoint:
            return None
        self._check(scale_name, (1,), want.dtype)
        zero = 0
        if zero_name in self.checkpoint:
            self._check(zero_name, (1,), torch.int8)
            zero = int(self._get(zero_name))
        return float(self._get(scale_name)), zero

    def _check(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        self.checkpoint.check(name, shape, *dtypes)

    def _get(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return self.checkpoint.get(name)

    def _error(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.checkpoint.where(name)}: {why}")

    def _permuted(self, name: str) -> CheckpointError:
        return self._error(
            name,
            "its groups are not runs of neighbouring columns (activation order without static groups), which has no "
            "exact form here; use a checkpoint made with desc_act=False or static_groups=True",
        )
