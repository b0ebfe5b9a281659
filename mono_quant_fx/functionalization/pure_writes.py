"""Writes as functions: what a functional graph calls where the model wrote into a part of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of `tensor` after ``tensor[index] = value``.

    >>> set_item(torch.zeros(3), slice(1, None), 2.0)
    tensor([0., 2., 2.])
    """
    if has_torch_function((tensor, value)):  # being traced
        return handle_torch_function(set_item, (tensor, value), tensor, index, value)
    changed = tensor.clone()
    changed[index] = value
    return changed


def set_piece(pieces: Sequence[Tensor], at: int, value: Tensor, dim: int) -> Tensor:
    """What ``split`` and its like took apart along `dim`, with `value` in the place of one piece.

    >>> set_piece(torch.arange(4).chunk(2), 0, torch.tensor([7, 8]), 0)
    tensor([7, 8, 2, 3])
    """
    changed = list(pieces)
    changed[at] = value
    return torch.cat(changed, dim)


class OnCopies(nn.Module):
    """Calls what writes, or may write, into its arguments on copies of these: gives (its result, the copies).

    Args:
        call: what is called.
        copied: the places of the arguments that are copied, in the flattened (args, kwargs).
        written: the places of the inputs (as fx.Node.all_input_nodes counts) that are still written, being state.
    """

    def __init__(self, call: Callable[..., Any], copied: Sequence[int], written: Sequence[int] = ()):
        super().__init__()
        self.call, self.copied, self.written = call, tuple(copied), tuple(written)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """See the class."""
        values, spec = pytree.tree_flatten((args, kwargs))
        copies: dict[int, Any] = {}
        for at in self.copied:
            if isinstance(values[at], Tensor):
                values[at] = copies.setdefault(id(values[at]), values[at].clone())
        args, kwargs = pytree.tree_unflatten(values, spec)
        return (self.call(*args, **kwargs), *(values[at] for at in self.copied))


class Through(nn.Module):
    """(tensor, value, what else `view` takes) -> a copy of the tensor in which the view of it holds `value`."""

    def __init__(self, view: Callable[..., Any]):
        super().__init__()
        self.view = view

    def forward(self, tensor: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See the class."""
        changed = tensor.clone()
        self.view(changed, *args, **kwargs).copy_(value)
        return changed


class Method:
    """A method of tensors as a function, which can be copied."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls it."""
        return getattr(tensor, self.name)(*args, **kwargs)
