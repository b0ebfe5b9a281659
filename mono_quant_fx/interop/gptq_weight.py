"""One weight of a GPTQ or AWQ checkpoint as codes of ours, after what the config says has been compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mono_quant_fx.config import QuantScheme
from mono_quant_fx.errors import CheckpointError
from mono_quant_fx.interop.foreign_tensors import (
    PERMUTED,
    Grouping,
    StoredWeight,
    Tensors,
    Wanted,
    grouping_of,
    scheme_of,
)
from mono_quant_fx.interop.packing import from_awq, from_gptq, group_order, unpack_words

#: What the tools call the same thing.
_NAMES = {
    "bits": ("bits", "w_bit"),
    "group_size": ("group_size", "q_group_size"),
    "checkpoint_format": ("checkpoint_format", "format"),
    "version": ("version",),
    "sym": ("sym",),
    "desc_act": ("desc_act",),
    "zero_point": ("zero_point",),
}
_SWITCHES = ("sym", "desc_act", "zero_point")


def statement(config: Mapping[str, Any], name: str, where: str, default: Any = None) -> Any:
    """What a config says under any of the names that mean the same.

    Raises:
        CheckpointError: two of them say different things, or a switch is neither on nor off.
    """
    said = {key: config[key] for key in _NAMES[name] if config.get(key) is not None}
    values = list(said.values())
    if any(value != values[0] for value in values):
        raise CheckpointError(
            f"{where}: {' and '.join(f'{k} {v!r}' for k, v in said.items())} mean the same and differ"
        )
    if values and name in _SWITCHES and type(values[0]) is not bool:
        raise CheckpointError(f"{where}: {name} {values[0]!r}: true or false is needed")
    return values[0] if values else default


def compare_configs(one: Mapping[str, Any], where: str, two: Mapping[str, Any], there: str) -> None:
    """Raises CheckpointError where two files of one folder say different things of its weights."""
    for name in _NAMES:
        said, other = statement(one, name, where), statement(two, name, there)
        if said is not None and other is not None and said != other:
            raise CheckpointError(
                f"{where}: {name} {said!r}, and {there}: {other!r}; remove the file that is wrong, or correct it"
            )


def check_config(method: str, config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for a variant that cannot be read."""
    bits = statement(config, "bits", where, 4)
    layout = statement(config, "checkpoint_format", where, "gptq")
    if method == "gptq" and layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{where}: checkpoint_format {layout!r}: 'gptq' or 'gptq_v2' can be read")
    if bits != 4 and (bits, method) != (8, "gptq"):
        raise CheckpointError(f"{where}: {method} of {bits} bits; 4 can be read (GPTQ: 4 and 8)")
    version = str(statement(config, "version", where, "gemm")).lower()
    if method == "awq" and version != "gemm":
        raise CheckpointError(f"{where}: version {version!r} of AWQ; 'gemm' can be read")


def read_gptq(tensors: Tensors, want: Wanted) -> StoredWeight:
    """qweight int32 [K * bits/32, N], qzeros int32 [G, N * bits/32], scales [G, N], g_idx [K] if it is there."""
    n, k, m, where = want.rows, want.columns, want.module, tensors.where
    bits = int(statement(tensors.config, "bits", where, 4))
    per_word = 32 // bits
    if n % per_word or k % per_word:
        raise tensors.error(f"{m}qweight", f"a weight of {[n, k]} does not fill words of {per_word} codes")
    _check_words(tensors, f"{m}qweight", 0, k, bits)
    tensors.check(f"{m}qweight", (k // per_word, n), torch.int32)
    grouping = _grouping(tensors, want, n // per_word)
    is_v2 = statement(tensors.config, "checkpoint_format", where) == "gptq_v2"
    qzeros = tensors.get(f"{m}qzeros")
    _check_symmetry(tensors, f"{m}qzeros", unpack_words(qzeros, bits), bits, is_v2)
    stored = from_gptq(
        tensors.get(f"{m}qweight"), qzeros, tensors.scale(f"{m}scales"), _order(tensors, want, grouping.groups), bits,
        0 if is_v2 else 1,
    )  # fmt: skip
    return StoredWeight(_scheme(tensors, want, bits, grouping, stored.weight_zero_point is None), stored)


def read_awq(tensors: Tensors, want: Wanted) -> StoredWeight:
    """qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]."""
    n, k, m = want.rows, want.columns, want.module
    if n % 8:
        raise tensors.error(f"{m}qweight", f"a weight of {[n, k]} does not fill words of 8 codes")
    tensors.check(f"{m}qweight", (k, n // 8), torch.int32)
    grouping = _grouping(tensors, want, n // 8)
    qzeros = tensors.get(f"{m}qzeros")
    zeros = unpack_words(qzeros, 4)
    if statement(tensors.config, "zero_point", tensors.where) is False and bool((zeros != 8).any()):
        raise tensors.contradiction(
            f"{m}qzeros", f"the zero points are {_span(zeros)} and not all 8", "zero_point false", _WAY_OUT
        )
    stored = from_awq(tensors.get(f"{m}qweight"), qzeros, tensors.scale(f"{m}scales"))
    return StoredWeight(_scheme(tensors, want, 4, grouping, stored.weight_zero_point is None), stored)


_WAY_OUT = "one of the two is wrong: correct the config if it is that, or quantize again"


def _check_words(tensors: Tensors, name: str, axis: int, codes: int, bits: int) -> None:
    """Raises CheckpointError where the words hold another number of bits than the config has."""
    shape = tensors.shape(name)
    other = next((b for b in (2, 3, 4, 8) if b != bits and len(shape) == 2 and shape[axis] == codes * b // 32), None)
    if other is not None:
        raise tensors.contradiction(
            name, f"{shape[axis]} words for {codes} columns hold codes of {other} bits", f"bits {bits}", _WAY_OUT
        )


def _grouping(tensors: Tensors, want: Wanted, words: int) -> Grouping:
    """The groups that the config asks for, after scales and zero points have been compared with them."""
    said = statement(tensors.config, "group_size", tensors.where, -1)
    grouping = grouping_of(said, want.columns, f"{tensors.where}: group_size {said!r} for {want.name!r}")
    scales = f"{want.module}scales"
    found = tensors.shape(scales)
    if len(found) == 2 and found[1] == want.rows and found[0] != grouping.groups:
        raise tensors.contradiction(
            scales, f"it has {found[0]} groups of {want.columns} columns, and {grouping.groups} are needed",
            f"group_size {said}", _WAY_OUT,
        )  # fmt: skip
    tensors.check(scales, (grouping.groups, want.rows), want.dtype)
    tensors.check(f"{want.module}qzeros", (grouping.groups, words), torch.int32)
    return grouping


def _check_symmetry(tensors: Tensors, name: str, stored: Tensor, bits: int, is_v2: bool) -> None:
    """Raises CheckpointError where zero points are not what `sym` and `checkpoint_format` say together."""
    middle = 1 << (bits - 1)
    sym = statement(tensors.config, "sym", tensors.where)
    mine, other = (middle, middle - 1) if is_v2 else (middle - 1, middle)
    names = ("gptq_v2", "gptq") if is_v2 else ("gptq", "gptq_v2")
    if sym is False or stored.numel() == 0 or bool((stored == mine).all()):
        return
    if bool((stored == other).all()):
        raise tensors.contradiction(
            name, f"all zero points are {other}, which is the middle by checkpoint_format {names[1]!r}",
            f"checkpoint_format {names[0]!r} (the default is 'gptq'), by which each weight would be off by one step",
            f"correct checkpoint_format to {names[1]!r}, or say sym false if the zero points are meant so",
        )  # fmt: skip
    if sym:
        raise tensors.contradiction(
            name, f"the zero points are {_span(stored)}", f"sym true, which is {mine} everywhere", _WAY_OUT
        )


def _order(tensors: Tensors, want: Wanted, groups: int) -> Tensor | None:
    """The group of each run of columns, where they do not stand in order."""
    name, act_order = f"{want.module}g_idx", statement(tensors.config, "desc_act", tensors.where)
    if name not in tensors:
        if act_order and groups > 1:
            raise tensors.error(name, f"it is missing, and {tensors.where} says desc_act true; {_WAY_OUT}")
        return None
    tensors.check(name, (want.columns,), torch.int32, torch.int64)
    order = group_order(tensors.get(name), groups)
    if order is None:
        raise tensors.error(name, PERMUTED)
    if torch.equal(order, torch.arange(groups)):
        return None
    if act_order is False:
        raise tensors.contradiction(name, "its groups do not stand in order", "desc_act false", _WAY_OUT)
    return order


def _scheme(tensors: Tensors, want: Wanted, bits: int, grouping: Grouping, symmetric: bool) -> QuantScheme:
    return scheme_of(bits, grouping, symmetric, f"{tensors.where}: group_size {grouping.size} for {want.name!r}")


def _span(values: Tensor) -> str:
    return f"{int(values.min())} .. {int(values.max())}" if values.min() != values.max() else f"all {int(values.min())}"
