"""From a float matrix and what is known of its inputs to stored codes, by one of three algorithms.

rtn    round to nearest with the scales that the extremes give; needs no data
clip   scales of least energy-weighted error (clip.py), then round to nearest; a row for which that is worse than rtn
       under the full Hessian, as correlated inputs can make it, stays as rtn leaves it
gptq   the same search inside GPTQ's error compensation (gptq.py), then coordinate descent on the result (refine.py)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mono_quant_fx.config import INT8, QuantScheme
from mono_quant_fx.errors import ConfigError
from mono_quant_fx.numerics import affine
from mono_quant_fx.numerics.clip import search_qparams
from mono_quant_fx.numerics.gptq import best_rows, damped, gptq
from mono_quant_fx.numerics.refine import refine

ALGORITHMS = ("rtn", "clip", "gptq")
#: Walks of GPTQ, each with scales searched on what the one before left. Measured: the second gains 0.1 to 0.2 dB.
GPTQ_ROUNDS = 2


@dataclass(frozen=True)
class RoundingOptions:
    """The algorithm and GPTQ's options (see gptq.gptq).

    Raises:
        ConfigError: an unknown algorithm.
    """

    algorithm: str = "rtn"
    damping: float = 0.01
    desc_act: bool = False

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"algorithm={self.algorithm!r}: one of {', '.join(ALGORITHMS)} is needed")


@dataclass(frozen=True)
class Rounded:
    """A stored weight, the algorithm that made it, and two figures on the calibration inputs (None without any).

    Attributes:
        gain_db: how much less output error than plain rounding to the same scheme.
        int8_gain_db: how much less output error INT8 per channel would have had.
        sqnr_db: of the op's output without its bias.
        reason: why it is rounded to nearest where another algorithm was asked for.
    """

    stored: affine.QuantizedWeight | None
    algorithm: str
    gain_db: float | None = None
    int8_gain_db: float | None = None
    sqnr_db: float | None = None
    reason: str = ""


def round_weight(
    matrix: Tensor, scheme: QuantScheme, H: Tensor | None, options: RoundingOptions, why: str = ""
) -> Rounded:
    """Rounds a float matrix [N, K] to `scheme`.

    Args:
        H: Hessian [groups, K, K] of its inputs (rows of the matrix belong to the groups in turn); None: no data, and
            then every algorithm is plain rounding. INT8 is rounded plainly as well: there is nothing to win.
        why: why there is no Hessian.

    Raises:
        WeightError: NaN or infinity in the matrix, or no usable Hessian.
    """
    plain = affine.quantize_matrix(matrix, scheme)
    is_plain = options.algorithm == "rtn" or scheme.bits == 8
    if H is None or not bool(H.any()):
        return Rounded(plain, "rtn", reason="" if is_plain or not why else f"rtn, not {options.algorithm}: {why}")
    stored, algorithm = plain, "rtn"
    if not is_plain:
        parts = [_round_group(m, h, scheme, options) for m, h in zip(matrix.chunk(H.shape[0]), H, strict=True)]
        packed, scale, zero_point = zip(*parts, strict=True)
        zero = None if scheme.symmetric else torch.cat(zero_point)
        stored, algorithm = affine.QuantizedWeight(torch.cat(packed), torch.cat(scale), zero), options.algorithm
    noise = _noise(matrix, stored, scheme.group_size, H)
    int8 = noise if scheme.bits == 8 else _noise(matrix, affine.quantize_matrix(matrix, INT8), -1, H)
    rounded = noise if algorithm == "rtn" else _noise(matrix, plain, scheme.group_size, H)
    signal = float(_energy(matrix, H))
    return Rounded(stored, algorithm, _ratio_db(rounded, noise), _ratio_db(noise, int8), _ratio_db(signal, noise))


def _round_group(matrix: Tensor, H: Tensor, scheme: QuantScheme, options: RoundingOptions) -> affine.QuantizedWeight:
    if options.algorithm == "gptq":
        damping = options.damping
        rounded = gptq(matrix, H, scheme, damping=damping, desc_act=options.desc_act, rounds=GPTQ_ROUNDS)
        codes, scale, zero_point = refine(matrix, damped(H, damping), scheme, *rounded)
    else:
        candidates = [affine.choose_qparams(matrix, scheme), search_qparams(matrix, scheme, H.diagonal())]
        rounded_plainly = [(affine.quantize(matrix, *qparams, scheme), *qparams) for qparams in candidates]
        codes, scale, zero_point = best_rows(matrix, H, scheme, *rounded_plainly)
    return affine.QuantizedWeight(affine.pack_int4(codes), scale, zero_point)


def _noise(matrix: Tensor, stored: affine.QuantizedWeight, group_size: int, H: Tensor) -> float:
    return float(_energy(matrix - affine.dequantize_weight(stored, group_size, matrix.shape[1]), H))


def _energy(rows: Tensor, H: Tensor) -> Tensor:
    """sum of r H r^T over the rows of [N, K]: the energy of the output that these rows give."""
    parts = zip(rows.float().chunk(H.shape[0]), H, strict=True)
    return sum(((part @ h * part).sum() for part, h in parts), torch.zeros(()))


def _ratio_db(a: float, b: float) -> float:
    if b <= 0.0:
        return math.inf if a > 0.0 else 0.0
    return 10.0 * math.log10(a / b) if a > 0.0 else -math.inf
