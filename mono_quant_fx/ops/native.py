"""The compiled kernels: found, chosen by what the CPU can do, and called through ctypes.

They are optional at install. Without them, and for what they do not take, the operators run in torch, which is slower
and gives the same results up to rounding. kernels() tells which path runs, and why.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import warnings
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from mono_quant_fx.errors import ConfigError, PerformanceWarning
from mono_quant_fx.ops import forking

#: From the slowest to the fastest; the place of a name is what the library's mq_cpu() returns.
PATHS = ("torch", "avx2", "avx512", "avx512_bf16")
#: Forces a path; it must be one that this machine can run.
VARIABLE = "MONO_QUANT_FX_KERNEL"
#: The numbers by which the library knows the types of elements.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


#: The two halves of mq_linear, and mq_dequantize, of kernels/api.h: pointers, sizes, and small numbers.
_WEIGHT, _CALL = struct.Struct("4P3q2i"), struct.Struct("2P3q4i8x")
_DEQUANTIZE = struct.Struct("4P4q3i")
#: Products below which waking a second thread takes longer than it saves.
ALONE = 1 << 17


@dataclass(frozen=True)
class Kernels:
    """What runs the INT4 and INT8 operators on this CPU.

    Attributes:
        active: one of PATHS.
        why: the reason, in words.
        available: the paths that this machine can run.
    """

    active: str
    why: str
    available: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.active}: {self.why} (available: {', '.join(self.available)})"


def kernels() -> Kernels:
    """Which path the operators take on the CPU, and why.

    The environment variable MONO_QUANT_FX_KERNEL, set before the first quantized operator runs, forces one.

    Raises:
        ConfigError: the variable names no path, or one that this machine cannot run.

    >>> kernels().active in kernels().available
    True
    """
    return _choose(os.environ.get(VARIABLE, "auto"))


@functools.cache
def _choose(asked: str) -> Kernels:
    library, missing = _library()
    best = library.mq_cpu() if library is not None else 0
    available = PATHS[: best + 1]
    if asked in available:
        return Kernels(asked, f"{VARIABLE}={asked}", available)
    if asked != "auto":
        known = "no path" if asked not in PATHS else "a path that this machine cannot run"
        why = f"; {missing}" if missing and asked in PATHS else ""
        raise ConfigError(f"{VARIABLE}={asked}: {known}; available: auto, {', '.join(available)}{why}")
    why = missing or ("the widest instructions that this CPU has" if best else "the CPU lacks AVX2, FMA or F16C")
    return Kernels(available[-1], why, available)


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    folder = Path(__file__).parent
    found = [folder / f"_kernels{suffix}" for suffix in EXTENSION_SUFFIXES if (folder / f"_kernels{suffix}").exists()]
    if not found:
        return (
            None,
            "the kernels were not compiled when mono_quant_fx was installed (a C compiler with OpenMP builds them)",
        )
    try:
        return ctypes.CDLL(str(found[0])), ""
    except OSError as e:
        return None, f"{found[0].name} does not load: {e}"


@functools.cache
def path() -> str:
    """The active path; the environment variable is read at the first call."""
    return kernels().active


@functools.cache
def has_int8(path: str) -> bool:
    """Whether INT8 dot products may be used on that path."""
    library, _ = _library()
    return path.startswith("avx512") and library is not None and bool(library.mq_vnni())


@functools.cache  # once, unless the warning is turned into an error
def say_slow() -> None:
    """Says that torch runs what a compiled kernel would run faster, unless that was asked for."""
    if os.environ.get(VARIABLE, "auto") == "auto":
        why = kernels().why
        warnings.warn(
            f"INT4 and INT8 operators run in torch, which is slower than float: {why}", PerformanceWarning, stacklevel=2
        )


def takes(stored: tuple[Tensor, Tensor, Tensor | None], bias: Tensor | None = None) -> bool:
    """Whether the library can read these: in one piece, of types that it knows. The codes are checked elsewhere."""
    _, scale, zero_point = stored
    return (
        all(t is None or t.is_contiguous() for t in (*stored, bias))
        and all(t is None or t.dtype in TYPES for t in (scale, bias))
        and (zero_point is None or zero_point.dtype == torch.int8)
    )


class Linear:
    """out [..., N] = x [..., K] @ dequantized.T + bias, by a kernel; see kernels/api.h. It holds no reference.

    Args:
        kernel: "int4_avx2" and so on.
        stored: weight_packed [N, ceil(K/8)] (INT8: [N, K]), weight_scale, weight_zero_point: checked, and such that
            takes() holds.
        columns: K.
        group_size: -1, or a positive multiple of 8, however large.
    """

    __slots__ = ("_columns", "_entry", "_weight", "outputs")

    def __init__(
        self,
        kernel: str,
        stored: tuple[Tensor, Tensor, Tensor | None],
        bias: Tensor | None,
        group_size: int,
        columns: int,
    ):
        packed, scale, zero_point = stored
        self._entry = _entry(f"mq_{kernel}")
        self._columns, self.outputs = columns, packed.shape[0]
        self._weight = _WEIGHT.pack(
            packed.data_ptr(), scale.data_ptr(),
            0 if zero_point is None else zero_point.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            columns, self.outputs, _group(group_size, columns), TYPES[scale.dtype],
            0 if bias is None else TYPES[bias.dtype],
        )  # fmt: skip

    def __call__(self, x: Tensor, out: Tensor, few: bool = False) -> bool:
        """Fills out, and tells whether it became finite: where it did not, its rows are to be computed in floats.

        Args:
            x: float32, bfloat16 or float16; contiguous, or a matrix whose rows are each in one piece.
            out: contiguous, not empty, of any of the three types.
            few: whether INT4 codes are unpacked in registers, not into panels: faster for a few rows of x.

        Raises:
            MemoryError: the scratch (4 MiB of x in another order, a panel) does not fit.
        """
        columns, outputs = self._columns, self.outputs
        rows = out.numel() // outputs
        call = _CALL.pack(
            x.data_ptr(), out.data_ptr(), rows, columns if x.is_contiguous() else x.stride(-2), outputs,
            TYPES[x.dtype], TYPES[out.dtype],
            1 if rows * columns * outputs < ALONE else forking.threads(), rows if few else 0,
        )  # fmt: skip
        status = self._entry(self._weight + call)
        if status < 0:
            _no_memory()
        return not status


def dequantize(
    bits: int, stored: tuple[Tensor, Tensor, Tensor | None], group_size: int, out: Tensor, first: int = 0
) -> None:
    """Rows first, first + 1, ... of a stored weight to `out` [rows, K] of any of the three types.

    Args:
        bits: 4 or 8. stored: as takes() wants them; INT8 codes are [N, K], with one group a row.
    """
    codes, scale, zero_point = stored
    rows, groups = out.shape[0], scale.shape[1]
    zero = 0 if zero_point is None else zero_point.data_ptr() + first * groups
    arguments = _DEQUANTIZE.pack(
        codes.data_ptr() + first * codes.stride(0) * codes.element_size(),
        scale.data_ptr() + first * groups * scale.element_size(),
        zero, out.data_ptr(), out.shape[1], rows, _group(group_size, out.shape[1]), out.stride(0),
        TYPES[scale.dtype], TYPES[out.dtype], forking.threads(),
    )  # fmt: skip
    if _entry(f"mq_dequantize_int{bits}")(arguments):
        _no_memory()


def _group(group_size: int, columns: int) -> int:
    """One group a row is -1 to the library, which counts in 64 bits."""
    return group_size if group_size < columns else -1


@functools.cache
def _entry(name: str) -> Any:
    library, why = _library()
    assert library is not None, why
    entry = getattr(library, name)
    entry.argtypes = [ctypes.c_char_p]  # the bytes of a struct
    return entry


def _no_memory() -> NoReturn:
    raise MemoryError("a quantized linear could not get memory for its scratch")
