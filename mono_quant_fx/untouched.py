"""Running a model as it is, and leaving its parameters as they were, although forward may write into them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, what an operator writes into a parameter is written; afterwards the parameter is as before.

    A lookup with a max_norm shortens rows of its weight, for one. Only what is written is copied.
    """
    journal = _Journal(model)
    try:
        with journal:
            yield
    finally:
        journal.restore()


class _Journal(TorchDispatchMode):
    """Keeps a copy of each parameter right before the first operator that writes into its memory."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.homes: dict[Any, list[Tensor]] = {}
        self.kept: dict[Any, list[Tensor]] = {}
        for parameter in model.parameters():
            home = None if parameter.is_meta else _home(parameter)
            if home is not None:
                self.homes.setdefault(home, []).append(parameter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for tensor in (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
                home = _home(tensor)
                if home in self.homes and home not in self.kept:
                    self.kept[home] = [p.detach().clone() for p in self.homes[home]]
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Writes the copies back."""
        for home, kept in self.kept.items():
            for parameter, before in zip(self.homes[home], kept, strict=True):
                with torch.no_grad(), _unsafe_preserve_version_counter(parameter):
                    parameter.copy_(before)


def _home(tensor: Tensor) -> Any:
    """What a tensor's memory is known by; None for one without."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # sparse, and the like
        return None
