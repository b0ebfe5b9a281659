"""Deep copies of modules that copy.deepcopy refuses: a lock, a tensor with a history, an open file on an attribute."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx, nn

#: How deep an attribute is searched for what cannot be copied.
_DEPTH = 6


def copied(value: Any, shared: Iterable[Tensor]) -> Any:
    """A deep copy in which the `shared` tensors are the same objects.

    What cannot be copied is shared as well, except a tensor that was computed with gradients (old weight_norm, prune
    and spectral_norm leave one on their module): the copy has its values.

    Raises:
        Exception: the class's own way to be copied fails; whatever that raises.
    """
    start: dict[int, Any] = {id(t): t for t in shared}
    memo = dict(start)
    try:
        result = copy.deepcopy(value, memo)
    except Exception:
        for stubborn in _stubborn(value, start, set(), _DEPTH):
            start[id(stubborn)] = stubborn.detach().clone() if isinstance(stubborn, Tensor) else stubborn
        memo = dict(start)
        result = copy.deepcopy(value, memo)
    if isinstance(value, nn.Module):
        _keep_hooks(value, result, memo)
        for module in result.modules():
            _rebind(module, memo)
    return result


_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")


def _keep_hooks(value: nn.Module, result: nn.Module, memo: dict[int, Any]) -> None:
    """Gives copies of GraphModules their hooks and their instance's forward, which GraphModule.__deepcopy__ drops."""
    copies = dict(result.named_modules(remove_duplicate=False))
    for name, module in value.named_modules(remove_duplicate=False):
        if isinstance(module, fx.GraphModule) and name in copies:
            twin: dict[str, Any] = copies[name].__dict__
            for kind in (*_HOOKS, "_forward_hooks_always_called"):
                twin[kind].update(copy.deepcopy(vars(module)[kind], memo))
            if "forward" in vars(module):
                twin["forward"] = copy.deepcopy(vars(module)["forward"], memo)


def _rebind(module: nn.Module, memo: dict[int, Any]) -> None:
    """Functions are never copied: those that hang on a module and close over the model get the copy instead."""
    own: dict[str, Any] = module.__dict__
    for held in (own, *(own[kind] for kind in _HOOKS if kind in own)):
        for name, value in list(held.items()):
            if isinstance(value, types.FunctionType):
                held[name] = _rebound(value, memo)


def _rebound(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    if id(function) in memo:
        return memo[id(function)]
    memo[id(function)] = function  # for one that closes over itself
    cells = [_copy_of(cell, memo) for cell in function.__closure__ or ()]
    named = {n: memo[id(v)] for n in function.__code__.co_names if id(v := function.__globals__.get(n)) in memo}
    modules = {n: v for n, v in named.items() if isinstance(v, nn.Module)}
    if modules or any(new is not old for new, old in zip(cells, function.__closure__ or (), strict=True)):
        space = {**function.__globals__, **modules} if modules else function.__globals__
        made = types.FunctionType(
            function.__code__, space, function.__name__, function.__defaults__, tuple(cells) or None
        )
        made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
        made.__module__ = function.__module__
        memo[id(function)] = made
    return memo[id(function)]


def _copy_of(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    try:
        value = cell.cell_contents
    except ValueError:  # an empty one
        return cell
    if isinstance(value, types.FunctionType):
        new: Any = _rebound(value, memo)
    else:
        new = memo.get(id(value), value)
    return cell if new is value else types.CellType(new)


def _stubborn(value: Any, memo: dict[int, Any], seen: set[int], depth: int) -> Iterator[Any]:
    """The objects behind a value that cannot be copied by themselves."""
    if id(value) in memo or id(value) in seen:
        return
    seen.add(id(value))
    parts = _parts(value)
    if not isinstance(value, nn.Module) and _copies(value, memo):
        return
    found = False
    for part in parts if depth else ():
        for one in _stubborn(part, memo, seen, depth if isinstance(part, nn.Module) else depth - 1):
            found = True
            yield one
    if not found and not isinstance(value, nn.Module):
        yield value


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    return list(getattr(value, "__dict__", {}).values())


def _copies(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True
