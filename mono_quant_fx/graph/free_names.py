"""Names for what passes attach to a graph: never one that the model uses itself.

A name is taken if a tensor, a module or any other attribute has it, and unreachable if what stands on the way to it is
no module. Only the attributes on the way are looked at, so that a name costs the same in a model of any size.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Sequence

from torch import nn

#: Longer names are cut: files limit their headers, and nobody reads more.
LONGEST = 96


def free_names(gm: nn.Module, names: Sequence[str], reserved: Collection[str] = ()) -> tuple[str, ...]:
    """These names, all with the same number behind them if one of them is taken.

    Args:
        reserved: names that are not in the graph, and taken all the same.

    >>> import torch
    >>> gm = nn.Module()
    >>> gm.register_buffer("weight_scale", torch.ones(1))
    >>> free_names(gm, ["weight_packed", "weight_scale"]), free_names(gm, ["bias"])
    (('weight_packed_1', 'weight_scale_1'), ('bias',))
    """
    bases = [_reachable(gm, name) for name in names]
    numbered = (tuple(f"{base}_{number}" if number else base for base in bases) for number in itertools.count())
    return next(found for found in numbered if _are_free(gm, found, reserved))


def free_name(gm: nn.Module, name: str, reserved: Collection[str] = ()) -> str:
    """A name, with a number behind it if it is taken."""
    return free_names(gm, [name], reserved)[0]


def free_base(gm: nn.Module, name: str, endings: Sequence[str], reserved: Collection[str] = ()) -> str:
    """A name, with a number behind it if it is taken with one of these endings."""
    base = _reachable(gm, name)
    numbered = (f"{base}_{number}" if number else base for number in itertools.count())
    return next(found for found in numbered if _are_free(gm, [found + ending for ending in endings], reserved))


def _reachable(gm: nn.Module, name: str) -> str:
    """A name that modules lead to, or could; else one at the root."""
    return name if _state(gm, name) != _BLOCKED else name.replace(".", "_")


def _are_free(gm: nn.Module, names: Sequence[str], reserved: Collection[str]) -> bool:
    return all(_state(gm, name) == _FREE and name not in reserved for name in names)


def shortened(name: str) -> str:
    """A name of at most LONGEST characters: its beginning and a digest of all of it."""
    if len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: LONGEST - 9].rstrip('._')}_{digest}"


_FREE, _TAKEN, _BLOCKED = "free", "taken", "blocked"


def _state(gm: nn.Module, name: str) -> str:
    *path, last = name.split(".")
    owner = gm
    for part in path:
        if part in owner._modules and owner._modules[part] is not None:
            owner = owner._modules[part]  # type: ignore[assignment]
        else:
            return _BLOCKED if _has(owner, part) else _FREE
    return _TAKEN if _has(owner, last) else _FREE


def _has(owner: nn.Module, name: str) -> bool:
    """Without running a property of the model's own."""
    tables = (owner._parameters, owner._buffers, owner._modules, owner.__dict__)
    return any(name in table for table in tables) or hasattr(type(owner), name)
