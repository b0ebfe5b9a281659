"""One weight of a compressed-tensors checkpoint as codes of ours, after its group's scheme was compared with it."""

from __future__ import annotations

import torch
from torch import Tensor

from mono_quant_fx.config import QuantScheme
from mono_quant_fx.interop.config_groups import Found, Group
from mono_quant_fx.interop.foreign_tensors import (
    PERMUTED,
    Grouping,
    StoredWeight,
    Tensors,
    Wanted,
    grouping_of,
    scheme_of,
)
from mono_quant_fx.interop.packing import from_packed, group_order, unpack_zero_points
from mono_quant_fx.interop.quantization_config import INT, PACKED
from mono_quant_fx.numerics.affine import QuantizedWeight, num_groups

_WAY_OUT = "one of the two is wrong: correct the config if it is that, or quantize again"


def read_packed(tensors: Tensors, found: Found, want: Wanted) -> StoredWeight:
    """weight_packed int32 [N, ceil(K * bits/32)], weight_scale [N, G], packed weight_zero_point, weight_shape [2]."""
    name, n, k = want.name, want.rows, want.columns
    group = _group(tensors, found, want, PACKED)
    bits = _bits(tensors, found, group, want)
    tensors.check(f"{name}_packed", (n, -(-k * bits // 32)), torch.int32)
    _check_shape(tensors, want)
    grouping = _grouping(tensors, found, group, want)
    tensors.check(f"{name}_scale", (n, grouping.groups), want.dtype)
    zero = _packed_zero_point(tensors, group, want, bits, grouping.groups)
    _check_order(tensors, group, want, grouping.groups)
    scheme = scheme_of(bits, grouping, zero is None, f"{tensors.where}: group_size {grouping.size} for {name!r}")
    stored = from_packed(tensors.get(f"{name}_packed"), tensors.scale(f"{name}_scale"), zero, k, bits)
    return StoredWeight(scheme, stored, _input(tensors, found, group, want))


def read_int8(tensors: Tensors, found: Found, want: Wanted) -> StoredWeight:
    """weight int8 [N, K], weight_scale and weight_zero_point [N, 1], or [1], which is the same for each row."""
    n, name = want.rows, want.name
    group = _group(tensors, found, want, INT)
    if group is not None and group.bits != 8:
        raise tensors.contradiction(
            name, "it is int8, a code a byte", f"num_bits {group.bits} ({group.name})", _WAY_OUT
        )
    tensors.check(name, (n, want.columns), torch.int8)
    strategy = group.strategy if group is not None else None
    is_one = tensors.shape(f"{name}_scale") == (1,)
    if strategy in ("channel", "tensor") and is_one is (strategy == "channel") and n > 1:
        raise tensors.contradiction(
            f"{name}_scale", f"it holds {1 if is_one else n} scales for {n} rows", f"strategy {strategy!r}", _WAY_OUT
        )
    shape = (1,) if is_one else (n, 1)
    tensors.check(f"{name}_scale", shape, want.dtype)
    zero_name, zero = f"{name}_zero_point", None
    if zero_name in tensors:
        tensors.check(zero_name, shape, torch.int8)
        zero = tensors.get(zero_name).expand(n, 1).contiguous()
        zero = zero if bool(zero.any()) else None
        _check_symmetric(tensors, group, zero_name, zero)
    scale = tensors.scale(f"{name}_scale").expand(n, 1).contiguous()
    stored = QuantizedWeight(tensors.get(name), scale, zero)
    return StoredWeight(QuantScheme(8, -1, zero is None), stored, _input(tensors, found, group, want))


def _group(tensors: Tensors, found: Found, want: Wanted, form: str) -> Group | None:
    """The config group of a weight's module; None where it is not known which one of several it is."""
    module = want.module.removesuffix(".")
    if found.ignores(module):
        raise tensors.contradiction(
            f"{want.name}_packed" if form == PACKED else want.name, "it is quantized", f"ignore {module!r}", _WAY_OUT
        )
    group = found.group_of(module, want.kinds)
    if group is not None and group.format is not None and (group.format == PACKED) is not (form == PACKED):
        raise tensors.contradiction(
            f"{want.name}_packed" if form == PACKED else want.name,
            "codes are packed into int32" if form == PACKED else "it has a byte for each code",
            f"format {group.format!r} ({group.name})", _WAY_OUT,
        )  # fmt: skip
    return group


def _bits(tensors: Tensors, found: Found, group: Group | None, want: Wanted) -> int:
    """4 or 8: what a row's words hold, and the group says."""
    name = f"{want.name}_packed"
    words = tensors.shape(name)[-1:]
    fitting = [b for b in (4, 8) if words == (-(-want.columns * b // 32),)]
    said = {group.bits} if group is not None else found.bits
    bits = [b for b in fitting if b in said]
    if len(bits) == 1:
        return bits[0]
    count = words[0] if words else 0
    if group is not None and fitting:
        raise tensors.contradiction(
            name, f"{count} words a row hold {want.columns} codes of {fitting[0]} bits",
            f"num_bits {group.bits} ({group.name})", _WAY_OUT,
        )  # fmt: skip
    raise tensors.error(name, f"{count} words a row do not hold {want.columns} codes of a group's bits")


def _check_shape(tensors: Tensors, want: Wanted) -> None:
    name = f"{want.name}_shape"
    tensors.check(name, (2,), torch.int64, torch.int32)
    shape = tensors.get(name).tolist()
    if shape != [want.rows, want.columns]:
        raise tensors.error(name, f"it says {shape}, and the model has {[want.rows, want.columns]}")


def _grouping(tensors: Tensors, found: Found, group: Group | None, want: Wanted) -> Grouping:
    """From the scale's shape, which one of the sizes in the config has to give."""
    scale, k = f"{want.name}_scale", want.columns
    if scale not in tensors:
        size = group.group_size if group is not None else None
        tensors.check(scale, (want.rows, num_groups(k, size or -1)), want.dtype)
    groups = (tensors.shape(scale)[-1:] or (1,))[0]
    said = {group.group_size} if group is not None and group.group_size is not None else found.group_sizes | {-1}
    fitting = {size for size in said if num_groups(k, size) == groups}
    if groups == 1 and fitting:
        fitting = {k} if k in fitting else {-1}
    size = fitting.pop() if len(fitting) == 1 else 0
    scheme = f" ({group.name}: strategy {group.strategy!r}, group_size {group.group_size})" if group is not None else ""
    return grouping_of(
        size, k, f"{scale}: {groups} groups of {k} columns follow from no group_size of {tensors.where}{scheme}"
    )


def _packed_zero_point(tensors: Tensors, group: Group | None, want: Wanted, bits: int, groups: int) -> Tensor | None:
    """Packed zero points int32 [ceil(N * bits/32), G], or None.

    Without any they are 0, also where the config says asymmetric: older versions left out what was 0 everywhere. Where
    it says symmetric, they may be there, packed or not, and have to be 0.
    """
    name, n = f"{want.name}_zero_point", want.rows
    if name not in tensors:
        return None
    if group is not None and group.symmetric and tensors.shape(name) == (n, groups):
        _check_symmetric(tensors, group, name, tensors.get(name))
        return None
    tensors.check(name, (-(-n * bits // 32), groups), torch.int32)
    packed = tensors.get(name)
    if group is not None and group.symmetric:
        _check_symmetric(tensors, group, name, unpack_zero_points(packed, n, bits))
        return None
    return packed


def _check_symmetric(tensors: Tensors, group: Group | None, name: str, zero: Tensor | None) -> None:
    if group is not None and group.symmetric and zero is not None and bool(zero.any()):
        raise tensors.contradiction(
            name, f"{int((zero != 0).sum())} of {zero.numel()} zero points are not 0", f"symmetric true ({group.name})",
            _WAY_OUT,
        )  # fmt: skip


def _check_order(tensors: Tensors, group: Group | None, want: Wanted, groups: int) -> None:
    """Groups are runs of columns, in order."""
    name = f"{want.name}_g_idx"
    if name not in tensors:
        if group is not None and group.act_order and groups > 1:
            said = f"actorder {group.act_order!r} ({group.name})"
            raise tensors.error(name, f"it is missing, but {tensors.where} says {said}; {_WAY_OUT}")
        return
    tensors.check(name, (want.columns,), torch.int32, torch.int64)
    order = group_order(tensors.get(name), groups)
    if order is None or not torch.equal(order, torch.arange(groups)):
        raise tensors.error(name, PERMUTED)


def _input(tensors: Tensors, found: Found, group: Group | None, want: Wanted) -> tuple[float, int] | None:
    """Scale and zero point of a static INT8 input."""
    scale_name, zero_name = f"{want.module}input_scale", f"{want.module}input_zero_point"
    is_static = group.static_input if group is not None else found.static_inputs
    if not is_static:
        return None
    if scale_name not in tensors:
        if group is None:
            return None
        raise tensors.error(
            scale_name, f"it is missing, but {tensors.where} says static input_activations ({group.name}); {_WAY_OUT}"
        )
    tensors.check(scale_name, (1,), want.dtype)
    scale = float(tensors.scale(scale_name))
    if scale <= 0:
        raise tensors.error(scale_name, f"a scale of {scale}; one above 0 is needed")
    zero = 0
    if zero_name in tensors:
        tensors.check(zero_name, (1,), torch.int8)
        zero = int(tensors.get(zero_name))
    if zero and group is not None and group.symmetric_input:
        raise tensors.contradiction(zero_name, f"it is {zero}", f"symmetric true ({group.name})", _WAY_OUT)
    return scale, zero
