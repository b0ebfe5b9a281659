"""What every operator asks of its tensors before it reads them: one device, memory of their own, and types it knows.

A graph that comes from a file can call an operator with anything, so nothing is left to whoever made the graph.
All of it raises RuntimeError, as operators do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mono_quant_fx.config import OPERATOR_COMPUTE

#: What x, a bias and a scale may be.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_places(**tensors: Tensor | None) -> None:
    """Raises unless all are strided tensors on one device, whose elements lie inside their storage.

    The first is no None.
    """
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_place(name, tensor, *next(iter(tensors.items())))


def _check_place(name: str, tensor: Tensor, first: str, other: Any) -> None:
    torch._check(
        tensor.device == other.device,
        lambda: (
            f"{name} is on {tensor.device}, but {first} on {other.device}: all tensors of an operator must be on one "
            "device, and a tensor on meta has no values to compute with"
        ),
    )
    torch._check(tensor.layout == torch.strided, lambda: f"{name}: a strided tensor needed, not one of {tensor.layout}")
    torch._check(has_memory(tensor), lambda: f"{name}: its storage is smaller than its shape needs (was it resized?)")


def has_memory(tensor: Tensor) -> bool:
    """Whether all elements of a tensor lie inside its storage; always, where there is no memory to read."""
    if tensor.device.type != "cpu" or type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.numel() == 0:
        return True
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + reach + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def check_float(name: str, tensor: Tensor | None) -> None:
    """Raises unless it is None or of one of FLOATS."""
    torch._check(
        tensor is None or tensor.dtype in FLOATS,
        lambda: f"{name}: float32, float64, bfloat16 or float16 needed, not {tensor.dtype}",  # type: ignore[union-attr]
    )


def check_bias(bias: Tensor | None, rows: int) -> None:
    """Raises unless it is None or one float for each of `rows` output channels."""
    torch._check(
        bias is None or tuple(bias.shape) == (rows,),
        lambda: f"bias: one value an output channel ({rows}) needed",
    )
    check_float("bias", bias)


def check_qparams(scale: Tensor, zero_point: Tensor | None, shape: tuple[int, int], need: str) -> None:
    """Raises unless a weight's scale is float, and its zero point int8 or None, both of `shape`: `need` in words."""
    torch._check(tuple(scale.shape) == shape, lambda: f"weight_scale is {tuple(scale.shape)}; {need}")
    check_float("weight_scale", scale)
    if zero_point is None:
        return
    torch._check(tuple(zero_point.shape) == shape, lambda: f"weight_zero_point is not of shape {shape}")
    torch._check(zero_point.dtype == torch.int8, lambda: f"weight_zero_point: int8 needed, not {zero_point.dtype}")


def check_compute(compute: str) -> None:
    """Raises unless it names what int4_linear can compute in."""
    torch._check(
        compute in OPERATOR_COMPUTE, lambda: f"compute={compute!r}: one of {', '.join(OPERATOR_COMPUTE)} needed"
    )
