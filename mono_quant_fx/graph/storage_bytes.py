"""How many bytes tensors stand for: what several of them share, or one repeats, counts once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Extent = tuple[int, int]


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that at least one of the tensors refers to.

    >>> flat = torch.zeros(10)
    >>> stored_bytes([flat[:4], flat[2:6].view(2, 2), flat[::3]]), stored_bytes([torch.zeros(1, 8).expand(4, 8)])
    (32, 32)
    """
    groups: dict[object, list[Tensor]] = {}
    total = 0
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # a sparse tensor has none of its own
            total += tensor.nbytes
        else:
            groups.setdefault((tensor.device, storage._cdata), []).append(tensor)
    return total + sum(_in_one_storage(group) for group in groups.values())


def _in_one_storage(tensors: list[Tensor]) -> int:
    parts = {(t.storage_offset(), tuple(t.shape), t.stride(), t.itemsize): t for t in tensors if t.numel()}
    if all(_is_dense(t) for t in parts.values()):
        return _union([_extent(t) for t in parts.values()])
    first = min(_extent(t)[0] for t in parts.values())
    used = torch.zeros(max(_extent(t)[1] for t in parts.values()) - first, dtype=torch.bool, device="cpu")
    for tensor in parts.values():
        used[_places(tensor) - first] = True
    return int(used.sum())


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill what they span, each with a place of its own."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _extent(tensor: Tensor) -> Extent:
    """The first byte in the storage, and the one past the last."""
    start = int(tensor.storage_offset()) * tensor.itemsize
    last: int = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def _union(extents: list[Extent]) -> int:
    total = end = 0
    for start, stop in sorted(extents):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def _places(tensor: Tensor) -> Tensor:
    """The places of a tensor's bytes in its storage."""
    at = torch.tensor([tensor.storage_offset()], device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = 1 if stride == 0 else size
        at = (at[:, None] + torch.arange(steps, device="cpu") * stride).flatten()
    return (at[:, None] * tensor.itemsize + torch.arange(tensor.itemsize, device="cpu")).flatten()
