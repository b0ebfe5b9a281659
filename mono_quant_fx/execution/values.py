"""Tensors without values: what is on the meta device, fake, or in a storage that was taken away cannot be quantized."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from mono_quant_fx.errors import CalibrationError, WeightError
from mono_quant_fx.execution.batch import Batch
from mono_quant_fx.graph.tensors import named_tensors
from mono_quant_fx.ops.operands import has_memory

SHOWN = 5


def why_without(tensor: Tensor) -> str | None:
    """Why it has no values, in words; None where it has them, or is a lazy parameter, which the first call makes."""
    if is_lazy(tensor):
        return None
    if tensor.is_meta:
        return "on the meta device"
    if isinstance(tensor, FakeTensor):
        return "a fake tensor"
    return None if has_memory(tensor) else "in a storage that is smaller than its shape"


def require_values(model: nn.Module) -> None:
    """Raises WeightError, which names them, unless every parameter and buffer holds values.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, device="meta"))
    >>> require_values(model)
    Traceback (most recent call last):
        ...
    mono_quant_fx.errors.WeightError: '1.weight' (on the meta device), '1.bias' (on the meta device): a model is \
quantized by its values, those of biases and buffers too; load them first (load_state_dict(..., assign=True)), or \
quantize the checkpoint itself (quantize_checkpoint)
    """
    tensors = named_tensors(model) if isinstance(model, nn.Module) else ()  # what is no module, capture refuses
    hollow = [f"{name!r} ({why})" for name, tensor in tensors if (why := why_without(tensor))]
    if hollow:
        more = f" and {len(hollow) - SHOWN} more" if len(hollow) > SHOWN else ""
        raise WeightError(
            f"{', '.join(hollow[:SHOWN])}{more}: a model is quantized by its values, those of biases and buffers too; "
            "load them first (load_state_dict(..., assign=True)), or quantize the checkpoint itself "
            "(quantize_checkpoint)"
        )


def require_inputs(example: Any, batches: Iterable[Batch]) -> None:
    """Raises CalibrationError, which names it, unless every tensor of the example and of the data holds values."""
    for place, inputs in [("example_inputs", example), *((f"batch {b.number}", b) for b in batches)]:
        leaves = (inputs.args, inputs.kwargs) if isinstance(inputs, Batch) else inputs
        for path, leaf in pytree.tree_flatten_with_path(leaves)[0]:
            why = why_without(leaf) if isinstance(leaf, Tensor) else None
            if why:
                raise CalibrationError(
                    f"{place}{pytree.keystr(path)} is {why}, without values; "
                    "give a tensor that has them, on the model's device"
                )
