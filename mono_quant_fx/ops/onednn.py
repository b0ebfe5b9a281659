"""torch's oneDNN kernels for INT8 activations and symmetric INT8 weights: exact int32 sums, scaled once in float32.

They take a weight in a layout of their own, made from the stored bytes at the first call and kept as long as the stored
tensor lives: a second copy of one byte a value.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mono_quant_fx.numerics.affine import QuantizedWeight
from mono_quant_fx.ops.activation import Codes
from mono_quant_fx.ops.window import Window

_PACKED: Any = WeakTensorKeyDictionary()
#: The dtypes that the kernels write; float16 goes through float32.
_WRITTEN = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}

#: Products of two codes, at most 255 * 128, that an int32 sum surely holds.
LONGEST = (2**31 - 1) // (255 * 128)


def can_run(x: Codes, weight: QuantizedWeight) -> bool:
    """Whether the kernels take this; if not, the reference runs, and on a CPU says so once a reason."""
    if x.codes.device.type != "cpu" or weight.weight_scale.dtype not in _WRITTEN:
        return False
    if x.codes.numel() == 0 or weight.weight_packed.numel() == 0:
        return False
    why = _missing()
    if weight.weight_zero_point is not None:
        why = why or "the INT8 weights are asymmetric"
    if weight.weight_packed.shape[1] > LONGEST:
        why = why or f"sums of more than {LONGEST} products may overflow"
    if why is not None:
        _say(why)
    return why is None


@functools.cache
def _missing() -> str | None:
    """Why this machine cannot run the kernels. Without VNNI, products of two bytes are summed in 16 saturating bits."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "this CPU has no VNNI instructions"
    return None


@functools.cache  # once a reason, unless the warning is turned into an error
def _say(why: str) -> None:
    warnings.warn(f"INT8 activations run through float matmuls, which is slower: {why}", stacklevel=2)


def linear(x: Codes, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] and weight int8 [N, K] -> [M, N] in weight_scale's dtype."""
    codes = weight.weight_packed
    packed = _packed(codes, "linear", lambda: torch.ops.onednn.qlinear_prepack(codes.contiguous(), None))
    dtype = weight.weight_scale.dtype
    out = torch.ops.onednn.qlinear_pointwise(*_scaled(x, packed, weight, bias), 1.0, 0, _WRITTEN[dtype], "none", [], "")
    return out.to(dtype)


def conv(x: Codes, weight: QuantizedWeight, bias: Tensor | None, window: Window) -> Tensor:
    """x [batch, C, *size] and weight int8 [N, C/groups * kernel] -> [batch, N, *size] in weight_scale's dtype."""
    codes, at = weight.weight_packed, window[1:]

    def prepack() -> Tensor:
        whole = codes.contiguous().view(len(codes), -1, *window.size)
        scale, zero_point = x.scale.item(), x.zero_point.item() + 128
        return torch.ops.onednn.qconv_prepack(whole, weight.weight_scale[:, 0].float(), scale, zero_point, *at, None)

    packed = _packed(codes, f"{window} {x.codes.shape[1]} {x.zero_point.item()}", prepack)
    dtype = weight.weight_scale.dtype
    out = torch.ops.onednn.qconv_pointwise(
        *_scaled(x, packed, weight, bias), *at, 1.0, 0, _WRITTEN[dtype], "none", [], ""
    )
    return out.to(dtype)


def _scaled(x: Codes, packed: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> tuple[Any, ...]:
    """The kernels' first seven arguments. The fast ones take unsigned codes: q + 128, which flips the top bit."""
    unsigned = x.codes.contiguous().view(torch.uint8) ^ 128
    scale = weight.weight_scale[:, 0].float()
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    bias = None if bias is None else bias.float()
    return unsigned, x.scale.item(), x.zero_point.item() + 128, packed, scale, zeros, bias


def _packed(codes: Tensor, use: str, prepack: Callable[[], Tensor]) -> Tensor:
    """The packed weight, made anew when the stored tensor was written into (its version counts the writes)."""
    if codes.is_inference():  # it counts no writes
        return prepack()
    version = (codes._version, codes.data_ptr(), codes.shape)
    kept = _PACKED.setdefault(codes, {})
    if use not in kept or kept[use][0] != version:
        kept[use] = version, prepack()
    return kept[use][1]
