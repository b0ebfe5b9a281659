"""Running a model as it is, and leaving its parameters as they were, although forward may write into them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, what a call of torch's writes into a parameter is written; afterwards the parameter is as before.

    A lookup with a max_norm shortens rows of its weight, for one. Only what is written is copied.
    """
    journal = _Journal(model)
    try:
        with journal:
            yield
    finally:
        journal.restore()


class _Journal(TorchFunctionMode):
    """Keeps a copy of each parameter right before the first call that may write into its memory.

    A TorchDispatchMode would see operators, but a torch.cond that runs under one fails for the rest of the process.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.homes: dict[Any, list[Tensor]] = {}
        self.kept: dict[Any, list[Tensor]] = {}
        self.data = [(p, p.detach()) for p in model.parameters() if not p.is_meta]
        for parameter, _ in self.data:
            self.homes.setdefault(_home(parameter), []).append(parameter)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_dynamo_compiling() and _may_write(func, args, kwargs):
            for tensor in (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
                home = _home(tensor)
                if home in self.homes and home not in self.kept:
                    self.kept[home] = [p.detach().clone() for p in self.homes[home]]
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Writes the copies back."""
        for parameter, data in self.data:
            if _home(parameter) != _home(data):  # forward set .data
                parameter.data = data
        for home, kept in self.kept.items():
            for tensor, before in zip(self.homes[home], kept, strict=True):
                with torch.no_grad(), _unsafe_preserve_version_counter(tensor):
                    tensor.copy_(before)


def _may_write(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call may write into what it is given: by schema, by torch's spelling, or as nothing is known of it."""
    if isinstance(func, torch._ops.OpOverload):
        return bool(func._schema.is_mutable)
    name, home = str(getattr(func, "__name__", "")), str(getattr(func, "__module__", None) or "torch")
    is_known = home.startswith("torch") and not home.startswith("torch._ops")
    is_asked = any(flag is True for flag in (*args, *kwargs.values())) or kwargs.get("out") is not None
    is_in_place = name.endswith("_") or name == "__setitem__" or name.startswith("__i")
    return not is_known or is_asked or is_in_place or func in (F.embedding, F.embedding_bag)


def _home(tensor: Tensor) -> Any:
    """What a tensor's memory is known by; itself where it has none (sparse, and the like)."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return id(tensor)
